// SPDX-License-Identifier: Apache-2.0
// Top-k of short rows of scores: one thread block per row, the row in registers.
//
//  1. A row of no more than k columns selects all of them.
//  2. The row is loaded, 32 scores per thread, as integers in the order of the scores, called keys
//     below. Each warp holds adjacent columns.
//  3. Radix histograms find the bucket that holds the key of rank k (radix_histogram.cuh), until
//     all its keys are selected or it is a single key.
//  4. Of tied scores the lower columns are selected: radix histograms of the columns find the last
//     of them. The keys of those selected are raised above the others.
//  5. A scan over how many columns each thread selects gives every selected column its rank.
//     Columns go to their ranks in shared memory, and from there to the output in whole lines, as
//     the positions that they stand for. Scores, if requested, are read again.
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/entry.hpp"
#include "cuda/columns.cuh"
#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "select/generic.hpp"
#include "select/generic_config.cuh"
#include "select/output.cuh"
#include "select/radix_histogram.cuh"

namespace misa::cuda::select {
namespace {

// Scores that a thread holds: they take half of its 64 registers, with 1024 threads per SM.
constexpr int kVectors = 8;  // of four scores
constexpr int kThreadScores = 4 * kVectors;

// How many outputs' columns and positions a thread loads at once.
constexpr int kOutputs = 4;

template <int threads>
struct ShortShared {
  // Four buckets per thread. One pass over a few thousand scores in a narrow range leaves a few
  // keys, a second pass rarely more than one.
  using Radix = RadixHistogram<threads, std::countr_zero(4U * threads)>;

  typename Radix::Shared radix;
  std::uint32_t selected[threads / 32];  // columns, per warp
};

// ordered_bits plus 1, but 0 for NaN: adding +0 turns -0 into +0 and every NaN into 0x7FFFFFFF, the
// only NaN that the device's arithmetic returns.
__device__ std::uint32_t short_key(float score) {
  const std::uint32_t bits = __float_as_uint(__fadd_rn(score, 0.0F));
  return (bits & 0x80000000U) != 0 ? 0 - bits : bits + 0x80000001U;
}

// The part of a row that a thread holds: kVectors times four columns, 128 apart. Beyond the row's
// end the scores are NaN: ranking last, they are never selected.
struct ThreadColumns {
  std::uint32_t first;  // column
  std::uint32_t keys[kThreadScores];

  __device__ ThreadColumns(const float* row, std::uint32_t length)
      : first(threadIdx.x * 4 + threadIdx.x / 32 * (32 * kThreadScores - 128)) {
    const bool aligned = reinterpret_cast<std::uintptr_t>(row) % sizeof(float4) == 0;
    const std::uint32_t vectorized = aligned ? length / 4 * 4 : 0;  // columns loaded as vectors
    float scores[kThreadScores];
#pragma unroll
    for (float& score : scores) {
      score = std::numeric_limits<float>::quiet_NaN();
    }
#pragma unroll
    for (int i = 0; i < kThreadScores; i += 4) {
      if (column(i) < vectorized) {
        const float4 vector = __ldcs(reinterpret_cast<const float4*>(row + column(i)));
        scores[i] = vector.x;
        scores[i + 1] = vector.y;
        scores[i + 2] = vector.z;
        scores[i + 3] = vector.w;
      }
    }
    if (vectorized < length) {
#pragma unroll
      for (int i = 0; i < kThreadScores; ++i) {
        if (column(i) >= vectorized && column(i) < length) {
          scores[i] = row[column(i)];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kThreadScores; ++i) {
      keys[i] = short_key(scores[i]);
    }
  }

  __device__ std::uint32_t column(int i) const { return first + i / 4 * 128 + i % 4; }
};

// Steps 3 and 4: the smallest key that is selected.
template <int threads>
__device__ std::uint32_t find_kth_key(ShortShared<threads>& shared, ThreadColumns& columns,
                                      std::uint32_t rank, std::uint32_t length) {
  using Radix = typename ShortShared<threads>::Radix;
  std::uint32_t below = kLargestKey;  // the smallest key that is not 0, less 1
  std::uint32_t largest = 0;
#pragma unroll
  for (const std::uint32_t key : columns.keys) {
    below = min(below, key - 1);
    largest = max(largest, key);
  }
  Bucket keys = Radix::initial_bucket(shared.radix, below + 1, largest, 0);
  do {
    keys = Radix::choose_bucket(shared.radix, keys, rank, [&](const auto& visitor) {
#pragma unroll
      for (const std::uint32_t key : columns.keys) {
        visitor(key, true);
      }
    });
  } while (keys.above + keys.count != rank && keys.range != 0);
  if (keys.above + keys.count == rank) {
    return keys.low;
  }
  const std::uint32_t tied = keys.count != 0 ? keys.low : 0;  // 0 (NaN) if too few are numbers
  // Columns are distinct, so this ends with a bucket whose columns are all selected.
  Bucket tied_columns{~(length - 1), length - 1, keys.above, length};
  do {
    tied_columns = Radix::choose_bucket(shared.radix, tied_columns, rank, [&](const auto& visitor) {
#pragma unroll
      for (int i = 0; i < kThreadScores; ++i) {
        visitor(~columns.column(i), columns.keys[i] == tied);
      }
    });
  } while (tied_columns.above + tied_columns.count != rank);
#pragma unroll
  for (int i = 0; i < kThreadScores; ++i) {
    if (columns.keys[i] == tied && ~columns.column(i) >= tied_columns.low) {
      columns.keys[i] = tied + 1;
    }
  }
  return tied + 1;
}

// Step 5, up to shared memory.
template <int threads>
__device__ void stage_columns(ShortShared<threads>& shared, std::uint16_t* staged,
                              const ThreadColumns& columns, std::uint32_t kth_key) {
  // Each vector has one byte of a word, which counts its selected columns. The sum over a warp is
  // at most 128.
  constexpr int kWords = kVectors / 4;
  constexpr std::uint32_t kOnes = 0x01010101;
  const auto of_vector = [](const std::uint32_t(&counts)[kWords], int i) {
    return counts[i / 4] >> i % 4 * 8 & 0xFF;
  };
  const unsigned lane = threadIdx.x % 32;
  const unsigned warp = threadIdx.x / 32;
  std::uint32_t before[kWords];       // selected by lower lanes
  std::uint32_t warp_counts[kWords];  // by the warp
  std::uint32_t selected = 0;         // by the warp in all vectors
#pragma unroll
  for (int word = 0; word < kWords; ++word) {
    std::uint32_t counts = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      counts += columns.keys[word * 16 + i] >= kth_key ? 1U << i / 4 * 8 : 0;
    }
    std::uint32_t end = counts;
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
      const std::uint32_t lower = __shfl_up_sync(kFullMask, end, step);
      end += lane >= step ? lower : 0;
    }
    before[word] = end - counts;
    warp_counts[word] = __shfl_sync(kFullMask, end, 31);
    selected = __dp4a(warp_counts[word], kOnes, selected);
  }
  if (lane == 0) {
    shared.selected[warp] = selected;
  }
  __syncthreads();
  std::uint32_t start = __reduce_add_sync(kFullMask, lane < warp ? shared.selected[lane] : 0);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    std::uint16_t* next = staged + start + of_vector(before, i);
#pragma unroll
    for (int j = 4 * i; j < 4 * i + 4; ++j) {
      if (columns.keys[j] >= kth_key) {
        *next++ = static_cast<std::uint16_t>(columns.column(j));
      }
    }
    start += of_vector(warp_counts, i);
  }
  __syncthreads();
}

template <int threads, class Source>
__global__ void __launch_bounds__(threads, 1024 / threads)
    short_kernel(const Logits logits, const Source keys, const Columns columns,
                 const std::uint32_t top_k, const TopK out, const bool empty) {
  begin_kernel();
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<ShortShared<threads>*>(memory);
  auto* staged = reinterpret_cast<std::uint16_t*>(memory + sizeof(ShortShared<threads>));

  const std::int64_t t = blockIdx.x;
  const float* row = logits.data + t * logits.row_stride;
  const std::uint32_t length = row_length(logits, t);
  if (length == 0 && !empty) {
    return;
  }
  const bool all = length <= top_k;  // step 1
  if (!all) {
    ShortShared<threads>::Radix::clear(shared.radix);
    ThreadColumns thread_columns(row, length);
    const std::uint32_t kth_key = find_kth_key(shared, thread_columns, top_k, length);
    stage_columns(shared, staged, thread_columns, kth_key);
  }

  const std::uint32_t count = min(length, top_k);
  const auto column_of = [&](std::uint32_t i) { return all ? i : staged[i]; };
  const std::int32_t n =
      columns.list != nullptr ? visible(keys, t).length : static_cast<std::int32_t>(length);
  const OutputRow output = output_row(out, t, top_k);
  for (std::uint32_t first = threadIdx.x; first < top_k; first += kOutputs * threads) {
    std::int32_t positions[kOutputs];
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
      const std::uint32_t i = first + j * threads;
      const std::int32_t position = position_of(columns, t, i < count ? column_of(i) : 0, n);
      positions[j] = i < count ? position : -1;
    }
#pragma unroll
    for (int j = 0; j < kOutputs; ++j) {
      if (first + j * threads < top_k) {
        output.indices[first + j * threads] = positions[j];
      }
    }
  }
  if (output.scores != nullptr) {
    for (std::uint32_t i = threadIdx.x; i < top_k; i += threads) {
      output.scores[i] = i < count ? score_of_bits(ordered_bits(row[column_of(i)]))
                                   : -std::numeric_limits<float>::infinity();
    }
  }
}

template <int threads, class Source>
void launch_short_rows(const Logits& logits, const Source& keys, const Columns& columns, int top_k,
                       const TopK& out, bool empty, void* stream) {
  const std::int64_t staged = std::min<std::int64_t>(top_k, logits.columns);
  const std::size_t bytes = sizeof(ShortShared<threads>) + sizeof(std::uint16_t) * staged;
  launch_kernel("selection", short_kernel<threads, Source>,
                dim3(static_cast<unsigned>(logits.rows)), threads, bytes, stream, logits, keys,
                columns, static_cast<std::uint32_t>(top_k), out, empty);
}

}  // namespace

template <class Source>
void launch_short(const Logits& logits, const Source& keys, const Columns& columns, int top_k,
                  const TopK& out, bool empty, void* stream) {
  static_assert(kShortColumns == 512 * kThreadScores);
  if (logits.columns <= 128 * kThreadScores) {
    launch_short_rows<128>(logits, keys, columns, top_k, out, empty, stream);
  } else if (logits.columns <= 256 * kThreadScores) {
    launch_short_rows<256>(logits, keys, columns, top_k, out, empty, stream);
  } else {
    launch_short_rows<512>(logits, keys, columns, top_k, out, empty, stream);
  }
}

template void launch_short(const Logits&, const DeviceRaggedSource&, const Columns&, int,
                           const TopK&, bool, void*);
template void launch_short(const Logits&, const DevicePagedSource&, const Columns&, int,
                           const TopK&, bool, void*);

}  // namespace misa::cuda::select
