// SPDX-License-Identifier: Apache-2.0
// Top-k of a row of scores in global memory, by one thread block that reads the row once.
//
//  1. A row of no more than k positions selects all of them.
//  2. A sample, spread evenly over the row, gives a threshold that should let through more than k
//     scores and fewer than shared memory holds.
//  3. The row is streamed once; the next vectors are loaded while the current ones are examined.
//     Scores above the threshold become candidates in shared memory. (If the whole row fits, it is
//     loaded without a threshold.)
//  4. The k-th entry (entry.hpp) is found
//       a. among the candidates, if they are at least k and fit;
//       b. among the scores tied at the threshold, if fewer than k exceed it but at least k exceed
//          or equal it: the lower positions, read from global memory, are selected;
//       c. else, as the sample was misleading, among all scores in global memory.
//  5. All entries from the k-th one on are written (emit.cuh).
//
// Every decision depends on counts alone, never on the order in which threads append, so results
// are the same bit for bit.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/entry.hpp"
#include "select/emit.cuh"
#include "select/gate_threshold.cuh"
#include "select/generic_config.cuh"
#include "select/kth.cuh"

namespace misa::cuda::select {

// A row as 16-byte vectors, and up to three scores before and after them.
struct Row {
  const float* scores;
  std::uint32_t length;
  std::uint32_t head;  // scores before the first vector
  std::uint32_t vectors;

  __device__ Row(const float* data, std::uint32_t n) : scores(data), length(n) {
    const auto misaligned = static_cast<std::uint32_t>(reinterpret_cast<std::uintptr_t>(data) % 16);
    head = min(n, (16 - misaligned) % 16 / 4);
    vectors = (n - head) / 4;
  }
  __device__ const float4* body() const { return reinterpret_cast<const float4*>(scores + head); }
  // The i-th of `count` sampled vectors; two make a segment.
  __device__ const float4* sample(std::uint32_t i, std::uint32_t count) const {
    const std::uint64_t pairs = vectors / 2;
    return body() + 2 * static_cast<std::uint32_t>(i / 2 * pairs / (count / 2)) + i % 2;
  }
};

// The entries that are selected from: `count` candidates, and of the first `length` scores of the
// row those whose key is at most `max_key`.
struct RowEntries {
  const RowCandidate* candidates;
  std::uint32_t count;
  const float* row;
  std::uint32_t length;
  std::uint32_t max_key;

  template <class Visitor>
  __device__ void visit(std::uint32_t first, std::uint32_t last, const Visitor& visitor) const {
    // Neighbouring candidates often share a word of emit's bitmap, so the lanes of a warp visit
    // candidates that are far apart; an odd stride avoids bank conflicts.
    const std::uint32_t stride = (count + 31) / 32 | 1;
    for (std::uint32_t offset = threadIdx.x / 32; offset < stride; offset += kThreads / 32) {
      const std::uint32_t i = threadIdx.x % 32 * stride + offset;
      const RowCandidate candidate = i < count ? candidates[i] : RowCandidate{};
      visitor(make_entry(candidate.score, candidate.position), i < count);
    }
    const std::uint32_t end = min(last, length);
    for (std::uint32_t base = first; base < end; base += kThreads * kLoads) {
      float scores[kLoads];
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const std::uint32_t position = base + i * kThreads + threadIdx.x;
        scores[i] = position < end ? row[position] : 0.0F;
      }
#pragma unroll
      for (int i = 0; i < kLoads; ++i) {
        const std::uint32_t position = base + i * kThreads + threadIdx.x;
        visitor(make_entry(scores[i], position),
                position < end && ordered_bits(scores[i]) <= max_key);
      }
    }
  }
};

// kLoads vectors of a row per thread, from vector `first` on. From `end` on they are NaN, which
// exceeds nothing.
struct Vectors {
  float4 loaded[kLoads];

  __device__ void load(const Row& row, std::uint32_t first, std::uint32_t end) {
    constexpr float kNone = std::numeric_limits<float>::quiet_NaN();
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const std::uint32_t vector = first + i * kThreads + threadIdx.x;
      loaded[i] =
          vector < end ? __ldcs(row.body() + vector) : make_float4(kNone, kNone, kNone, kNone);
    }
  }
};

// Step 2, from a sample of `vectors` vectors a thread.
template <int vectors = kSampleVectors>
__device__ float sample_threshold(Shared& shared, const RowPlan& plan, const Row& row) {
  Radix::clear(shared.radix);
  std::uint32_t keys[vectors * 4];
#pragma unroll
  for (int i = 0; i < vectors; ++i) {
    const float4 scores = *row.sample(i * kThreads + threadIdx.x, vectors * kThreads);
    keys[4 * i] = ordered_bits(scores.x);
    keys[4 * i + 1] = ordered_bits(scores.y);
    keys[4 * i + 2] = ordered_bits(scores.z);
    keys[4 * i + 3] = ordered_bits(scores.w);
  }
  std::uint32_t smallest = kLargestKey;
  std::uint32_t largest = 0;
#pragma unroll
  for (const std::uint32_t key : keys) {
    smallest = min(smallest, key);
    largest = max(largest, key);
  }
  const Bucket all = Radix::initial_bucket(shared.radix, smallest, largest, vectors * 4);
  const auto rank = [&](std::uint32_t scores) {
    return static_cast<std::uint32_t>(std::uint64_t{scores} * kSampled<vectors> / row.length);
  };
  // At most three quarters of the capacity should be filled, also where scores are tied.
  const std::uint32_t max_passing = rank(plan.capacity / 4 * 3);
  const auto visit = [&](const auto& visitor) {
#pragma unroll
    for (const std::uint32_t key : keys) {
      visitor(key, true);
    }
  };
  const float threshold = find_gate_threshold<Radix>(shared.radix, all, max(1U, rank(plan.target)),
                                                     max_passing, max_passing, visit);
  // The threshold is NaN where NaN are tied.
  return fmaxf(threshold, -std::numeric_limits<float>::infinity());
}

// Step 3 for N scores of each thread, at positions position_of(0 to N - 1).
template <int N, class PositionOf>
__device__ void append(Shared& shared, RowCandidate* candidates, std::uint32_t capacity,
                       float threshold, const float (&scores)[N], const PositionOf& position_of) {
  std::uint32_t passing = 0;
#pragma unroll
  for (const float score : scores) {
    passing += score > threshold ? 1 : 0;
  }
  if (!__any_sync(kFullMask, passing != 0)) {
    return;
  }
  const unsigned lane = threadIdx.x % 32;
  std::uint32_t end = passing;
#pragma unroll
  for (unsigned step = 1; step < 32; step *= 2) {
    const std::uint32_t before = __shfl_up_sync(kFullMask, end, step);
    end += lane >= step ? before : 0;
  }
  std::uint32_t base = 0;
  if (lane == 31) {
    base = atomicAdd(&shared.appended, end);
  }
  base = __shfl_sync(kFullMask, base, 31);
  if (base + __shfl_sync(kFullMask, end, 31) > capacity) {
    return;  // too many: step 4c will ignore the candidates
  }
  RowCandidate* next = candidates + base + end - passing;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (scores[i] > threshold) {
      *next++ = {scores[i], position_of(i)};
    }
  }
}

// Step 3 for the vectors from `first` up to `end`; `next` holds the first ones.
__device__ inline void stream(Shared& shared, RowCandidate* candidates, std::uint32_t capacity,
                              float threshold, const Row& row, std::uint32_t first,
                              std::uint32_t end, Vectors& next) {
  constexpr std::uint32_t kStep = kThreads * kLoads;
#pragma unroll 2
  for (; first < end; first += kStep) {
    const Vectors current = next;
    next.load(row, first + kStep, end);
    float scores[kLoads * 4];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      scores[4 * i] = current.loaded[i].x;
      scores[4 * i + 1] = current.loaded[i].y;
      scores[4 * i + 2] = current.loaded[i].z;
      scores[4 * i + 3] = current.loaded[i].w;
    }
    append(shared, candidates, capacity, threshold, scores,
           [&](int i) { return row.head + 4 * (first + i / 4 * kThreads + threadIdx.x) + i % 4; });
  }
}

// Step 3 for the scores beside the vectors: at most three before them and three after them.
__device__ inline void append_edges(Shared& shared, RowCandidate* candidates,
                                    std::uint32_t capacity, float threshold, const Row& row,
                                    bool before, bool after) {
  const bool is_before = threadIdx.x < row.head;
  const std::uint32_t position = is_before ? threadIdx.x : threadIdx.x + 4 * row.vectors;
  const float edge[1] = {position < row.length && (is_before ? before : after)
                             ? row.scores[position]
                             : std::numeric_limits<float>::quiet_NaN()};
  append(shared, candidates, capacity, threshold, edge, [&](int) { return position; });
}

// Step 4b: the entry of rank `rank` (from 1, lower positions first) among the scores equal to the
// threshold; 0 if there are fewer.
__device__ inline std::uint64_t find_tied_entry(Shared& shared, const Row& row, float threshold,
                                                std::uint32_t rank) {
  for (std::uint32_t first = 0; first < row.length; first += kWindow) {
#pragma unroll 4
    for (std::uint32_t i = threadIdx.x; i < kWindow; i += kThreads) {
      const std::uint32_t position = first + i;
      const bool equal = position < row.length && row.scores[position] == threshold;
      const std::uint32_t word = __ballot_sync(kFullMask, equal);
      if (threadIdx.x % 32 == 0) {
        shared.radix.histogram[i / 32] = word;
      }
    }
    __syncthreads();
    std::uint32_t tied = 0;
    for (int i = 0; i < 4; ++i) {
      tied += static_cast<std::uint32_t>(__popc(shared.radix.histogram[threadIdx.x * 4 + i]));
    }
    std::uint32_t before = 0;
    std::uint32_t total = 0;
    Radix::Scan(shared.radix.scan).ExclusiveSum(tied, before, total);
    if (before < rank && rank <= before + tied) {
      for (std::uint32_t word = threadIdx.x * 4; before < rank; ++word) {
        for (std::uint32_t bits = shared.radix.histogram[word]; bits != 0; bits &= bits - 1) {
          if (++before == rank) {
            const std::uint32_t bit = __ffs(static_cast<int>(bits)) - 1;
            shared.kth_entry = make_entry(threshold, first + word * 32 + bit);
            break;
          }
        }
      }
    }
    __syncthreads();
    if (rank <= total) {
      return shared.kth_entry;
    }
    rank -= total;
  }
  return 0;
}

// The memory of a thread block: plan.bytes(), aligned to 16 bytes.
struct RowMemory {
  Shared& shared;
  RowCandidate* candidates;
  std::uint16_t* staged;

  __device__ RowMemory(std::byte* memory, const RowPlan& plan)
      : shared(*reinterpret_cast<Shared*>(memory)),
        candidates(reinterpret_cast<RowCandidate*>(memory + sizeof(Shared))),
        staged(reinterpret_cast<std::uint16_t*>(candidates + plan.capacity)) {}
};

// Step 1.
__device__ inline void select_whole(const Row& row, std::uint32_t top_k, const OutputRow& out) {
  for (std::uint32_t i = threadIdx.x; i < row.length; i += kThreads) {
    out.indices[i] = static_cast<std::int32_t>(i);
    if (out.scores != nullptr) {
      out.scores[i] = score_of_bits(ordered_bits(row.scores[i]));
    }
  }
  pad(out, row.length, top_k);
}

// Steps 4 and 5: `count` scores exceed the threshold; if they fit, they are the candidates.
__device__ inline void select_candidates(const RowMemory& memory, const RowPlan& plan,
                                         const Row& row, std::uint32_t count, float threshold,
                                         const OutputRow& out) {
  Shared& shared = memory.shared;
  const std::uint32_t top_k = plan.top_k;
  const std::uint32_t length = row.length;
  RowEntries source{memory.candidates, count, row.scores, 0, 0};  // step 4a
  std::uint64_t kth_entry = 0;
  const bool fits = count <= plan.capacity;
  if (fits && count < top_k) {  // step 4b
    kth_entry = find_tied_entry(shared, row, threshold, top_k - count);
    source.length = min(entry_position(kth_entry) + 1, length);
    source.max_key = static_cast<std::uint32_t>(kth_entry >> 32);
  }
  if (kth_entry == 0) {
    if (!fits || count < top_k) {  // step 4c
      source = {memory.candidates, 0, row.scores, length, kLargestKey};
    }
    kth_entry =
        find_kth_entry(shared, max(source.count, source.length), top_k, length,
                       [&](const auto& visitor) { source.visit(0, source.length, visitor); });
  }
  emit(shared, memory.staged, source, kth_entry, length, top_k, out);
}

// Selects one row. All kThreads threads of the thread block call it and synchronise between two
// calls. The row may have been written by the same thread block before a barrier.
__device__ inline void select_row(std::byte* bytes, const RowPlan& plan, const float* row_scores,
                                  std::uint32_t length, const OutputRow& out) {
  const RowMemory memory(bytes, plan);
  Shared& shared = memory.shared;
  const Row row(row_scores, length);
  if (length <= plan.top_k) {
    select_whole(row, plan.top_k, out);
    return;
  }
  std::uint32_t count = length;
  float threshold = 0;
  if (length <= plan.capacity) {
#pragma unroll 4
    for (std::uint32_t i = threadIdx.x; i < length; i += kThreads) {
      memory.candidates[i] = {row.scores[i], i};
    }
    __syncthreads();
  } else {
    if (threadIdx.x == 0) {
      shared.appended = 0;
    }
    Vectors first;
    first.load(row, 0, row.vectors);
    threshold = length < kLeastManySamples  // has barriers
                    ? sample_threshold(shared, plan, row)
                    : sample_threshold<kManySampleVectors>(shared, plan, row);
    stream(shared, memory.candidates, plan.capacity, threshold, row, 0, row.vectors, first);
    append_edges(shared, memory.candidates, plan.capacity, threshold, row, true, true);
    __syncthreads();
    count = shared.appended;
  }
  select_candidates(memory, plan, row, count, threshold, out);
}

}  // namespace misa::cuda::select
