// SPDX-License-Identifier: Apache-2.0
// Top-k of a row of scores in global memory, by one thread block: one read of the row.
//
//  1. A row of no more than k positions selects all of them.
//  2. A sample, spread evenly over the row, gives a threshold that should let through more than k
//     scores and fewer than shared memory holds.
//  3. The row is streamed once, the next vectors under way while these are looked at. Scores above
//     the threshold become candidates in shared memory. (A row that fits is taken whole, without a
//     threshold.)
//  4. The cut, the entry (entry.hpp) of rank k, comes
//       a. from the candidates, if there are at least k and they fit;
//       b. from the threshold, if it is a plateau: fewer than k above it, at least k with it. The
//          lowest of the equals, read from global memory, fill up;
//       c. else, where the sample misled, from the row in global memory.
//  5. All entries from the cut on are written (emit.cuh).
//
// Every choice on the way depends on counts alone, never on the order in which threads appended, so
// the result is the same bit for bit.
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

// A row in 16-byte vectors, with what stands before and behind them.
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
  // Of the 2 kSegments vectors that are sampled the i-th; two make a segment.
  __device__ const float4* sample(std::uint32_t i) const {
    const std::uint64_t pairs = vectors / 2;
    return body() + 2 * static_cast<std::uint32_t>(i / 2 * pairs / kSegments) + i % 2;
  }
};

// The entries that selection draws from: candidates, and those of the row that are no larger than
// a ceiling.
struct RowSource {
  const Held* held;
  std::uint32_t count;
  const float* row;
  std::uint32_t length;
  std::uint32_t ceiling;

  template <class Visitor>
  __device__ void visit(std::uint32_t first, std::uint32_t last, const Visitor& visitor) const {
    // Neighbours were appended together and mostly have a word of emit's bitmap in common, so lanes
    // take entries that lie apart, by an odd number for the banks.
    const std::uint32_t step = (count + 31) / 32 | 1;
    for (std::uint32_t own = threadIdx.x / 32; own < step; own += kThreads / 32) {
      const std::uint32_t i = threadIdx.x % 32 * step + own;
      const Held candidate = i < count ? held[i] : Held{};
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
                position < end && ordered_bits(scores[i]) <= ceiling);
      }
    }
  }
};

// Vectors of a row, kLoads a thread. Behind the last one stands NaN, which is above nothing.
struct Vectors {
  float4 own[kLoads];

  __device__ void load(const Row& row, std::uint32_t first) {
    constexpr float kNone = std::numeric_limits<float>::quiet_NaN();
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      const std::uint32_t vector = first + i * kThreads + threadIdx.x;
      own[i] = vector < row.vectors ? __ldcs(row.body() + vector)
                                    : make_float4(kNone, kNone, kNone, kNone);
    }
  }
};

// Step 2.
__device__ inline float sample_threshold(Shared& shared, const RowPlan& plan, const Row& row) {
  Radix::clear(shared.radix);
  std::uint32_t keys[kSampleVectors * 4];
#pragma unroll
  for (int i = 0; i < kSampleVectors; ++i) {
    const float4 scores = *row.sample(i * kThreads + threadIdx.x);
    keys[4 * i] = ordered_bits(scores.x);
    keys[4 * i + 1] = ordered_bits(scores.y);
    keys[4 * i + 2] = ordered_bits(scores.z);
    keys[4 * i + 3] = ordered_bits(scores.w);
  }
  std::uint32_t smallest = kWarp;
  std::uint32_t largest = 0;
#pragma unroll
  for (const std::uint32_t key : keys) {
    smallest = min(smallest, key);
    largest = max(largest, key);
  }
  const Bucket all = Radix::bracket_all(shared.radix, smallest, largest, kSampleVectors * 4);
  const auto rank = [&](std::uint32_t scores) {
    return static_cast<std::uint32_t>(std::uint64_t{scores} * kSample / row.length);
  };
  // All of a bucket may pass if that should fill no more than three quarters of the capacity; one
  // key that is too many is a plateau.
  const std::uint32_t most = rank(plan.capacity / 4 * 3);
  const float threshold = find_gate_threshold<Radix>(shared.radix, all, max(1U, rank(plan.target)),
                                                     most, most, [&](const auto& visitor) {
#pragma unroll
                                                       for (const std::uint32_t key : keys) {
                                                         visitor(key, true);
                                                       }
                                                     });
  return fmaxf(threshold, -std::numeric_limits<float>::infinity());  // a plateau of NaN
}

// Step 3 for N scores a thread; position_of says where they stand.
template <int N, class PositionOf>
__device__ void append(Shared& shared, Held* held, std::uint32_t capacity, float threshold,
                       const float (&scores)[N], const PositionOf& position_of) {
  std::uint32_t own = 0;
#pragma unroll
  for (const float score : scores) {
    own += score > threshold ? 1 : 0;
  }
  if (!__any_sync(kFullMask, own != 0)) {
    return;
  }
  const unsigned lane = threadIdx.x % 32;
  std::uint32_t end = own;
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
    return;  // too many: none of them will be looked at
  }
  Held* place = held + base + end - own;
#pragma unroll
  for (int i = 0; i < N; ++i) {
    if (scores[i] > threshold) {
      *place++ = {scores[i], position_of(i)};
    }
  }
}

// `next`: the first vectors, loaded.
__device__ inline void stream(Shared& shared, Held* held, std::uint32_t capacity, float threshold,
                              const Row& row, Vectors& next) {
  constexpr std::uint32_t kStep = kThreads * kLoads;
#pragma unroll 2
  for (std::uint32_t first = 0; first < row.vectors; first += kStep) {
    const Vectors now = next;
    next.load(row, first + kStep);
    float scores[kLoads * 4];
#pragma unroll
    for (int i = 0; i < kLoads; ++i) {
      scores[4 * i] = now.own[i].x;
      scores[4 * i + 1] = now.own[i].y;
      scores[4 * i + 2] = now.own[i].z;
      scores[4 * i + 3] = now.own[i].w;
    }
    append(shared, held, capacity, threshold, scores,
           [&](int i) { return row.head + 4 * (first + i / 4 * kThreads + threadIdx.x) + i % 4; });
  }
  // At most three scores before the vectors and three behind them.
  const std::uint32_t body = 4 * row.vectors;
  const std::uint32_t position = threadIdx.x < row.head ? threadIdx.x : threadIdx.x + body;
  const float edge[1] = {position < row.length ? row.scores[position]
                                               : std::numeric_limits<float>::quiet_NaN()};
  append(shared, held, capacity, threshold, edge, [&](int) { return position; });
}

// Step 4b: the entry of the wanted-th (from 1) of the scores equal to a threshold, lowest first; 0
// if there are not so many.
__device__ inline std::uint64_t nth_equal(Shared& shared, const Row& row, float threshold,
                                          std::uint32_t wanted) {
  for (std::uint32_t first = 0; first < row.length; first += kWindow) {
#pragma unroll 4
    for (std::uint32_t i = threadIdx.x; i < kWindow; i += kThreads) {
      const std::uint32_t position = first + i;
      const bool equal = position < row.length && row.scores[position] == threshold;
      const std::uint32_t word = __ballot_sync(kFullMask, equal);
      if (threadIdx.x % 32 == 0) {
        shared.radix.words[i / 32] = word;
      }
    }
    __syncthreads();
    std::uint32_t own = 0;
    for (int i = 0; i < 4; ++i) {
      own += static_cast<std::uint32_t>(__popc(shared.radix.words[threadIdx.x * 4 + i]));
    }
    std::uint32_t before = 0;
    std::uint32_t total = 0;
    Radix::Scan(shared.radix.scan).ExclusiveSum(own, before, total);
    if (before < wanted && wanted <= before + own) {
      for (std::uint32_t word = threadIdx.x * 4; before < wanted; ++word) {
        for (std::uint32_t bits = shared.radix.words[word]; bits != 0; bits &= bits - 1) {
          if (++before == wanted) {
            const std::uint32_t bit = __ffs(static_cast<int>(bits)) - 1;
            shared.cut = make_entry(threshold, first + word * 32 + bit);
            break;
          }
        }
      }
    }
    __syncthreads();
    if (wanted <= total) {
      return shared.cut;
    }
    wanted -= total;
  }
  return 0;
}

// Selects one row. Called by all kThreads threads of a block with plan.bytes() of shared memory,
// aligned to 16 bytes; a block that goes on to another row synchronises in between. The row may
// have been written by this block before a barrier.
__device__ inline void select_row(std::byte* memory, const RowPlan& plan, const float* row_scores,
                                  std::uint32_t length, const OutputRow& out) {
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  auto* held = reinterpret_cast<Held*>(memory + sizeof(Shared));
  auto* staged = reinterpret_cast<std::uint16_t*>(held + plan.capacity);
  const std::uint32_t top_k = plan.top_k;
  const Row row(row_scores, length);

  if (length <= top_k) {  // step 1
    for (std::uint32_t i = threadIdx.x; i < length; i += kThreads) {
      out.indices[i] = static_cast<std::int32_t>(i);
      if (out.scores != nullptr) {
        out.scores[i] = score_of_bits(ordered_bits(row.scores[i]));
      }
    }
    pad(out, length, top_k);
    return;
  }

  std::uint32_t count = length;
  float threshold = 0;
  if (length <= plan.capacity) {
#pragma unroll 4
    for (std::uint32_t i = threadIdx.x; i < length; i += kThreads) {
      held[i] = {row.scores[i], i};
    }
    __syncthreads();
  } else {
    if (threadIdx.x == 0) {
      shared.appended = 0;
    }
    Vectors first;
    first.load(row, 0);
    threshold = sample_threshold(shared, plan, row);  // has barriers
    stream(shared, held, plan.capacity, threshold, row, first);
    __syncthreads();
    count = shared.appended;
  }

  RowSource source{held, count, row.scores, 0, 0};  // step 4a
  std::uint64_t cut = 0;
  const bool fits = count <= plan.capacity;
  if (fits && count < top_k) {  // step 4b
    cut = nth_equal(shared, row, threshold, top_k - count);
    source.length = min(entry_position(cut) + 1, length);
    source.ceiling = static_cast<std::uint32_t>(cut >> 32);
  }
  if (cut == 0) {
    if (!fits || count < top_k) {  // step 4c
      source = {held, 0, row.scores, length, kWarp};
    }
    cut = find_kth(shared, max(source.count, source.length), top_k, length,
                   [&](const auto& visitor) { source.visit(0, source.length, visitor); });
  }
  emit(shared, staged, source, cut, length, top_k, out);
}

}  // namespace misa::cuda::select
