// SPDX-License-Identifier: Apache-2.0
// Top-k of short rows of scores: one thread block a row, which it holds in registers.
//
//  1. A row of no more than k columns selects all of them.
//  2. The row is loaded, 32 scores a thread, as integers that have their order. Each warp holds a
//     stretch of it.
//  3. RadixHistogram narrow down where the key of rank k lies (digits.cuh), until all keys of the
//  bin are
//     wanted, or it is one key.
//  4. On such a plateau the lower columns win: digits of the columns say up to which one. The keys
//     of those are raised above the others.
//  5. A scan over how many each thread selects gives every selected column its rank. Columns go
//     there in shared memory, from there to the output in whole lines, as the positions that they
//     stand for. Scores, if wanted, are read again.
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/entry.hpp"
#include "cuda/launch.cuh"
#include "cuda/range.cuh"
#include "select/generic.hpp"
#include "select/generic_config.cuh"
#include "select/output.cuh"
#include "select/radix_histogram.cuh"

namespace misa::cuda::select {
namespace {

// Scores of a thread: half of the 64 registers that each of 1024 threads an SM may have.
constexpr int kVectors = 8;  // of four scores
constexpr int kOwn = 4 * kVectors;

// Outputs of a thread whose columns and positions are fetched together.
constexpr int kOutputs = 4;

template <int threads>
struct ShortShared {
  // Four bins a thread. One digit of some thousand scores in a narrow range leaves a few, a second
  // one rarely more than one.
  using Radix = RadixHistogram<threads, std::countr_zero(4U * threads)>;

  typename Radix::Shared radix;
  std::uint32_t selected[threads / 32];  // by each warp
};

// ordered_bits plus 1; 0 for NaN. The sum is +0 for -0 and 0x7FFFFFFF for every NaN, the one that
// the device's arithmetic returns.
__device__ std::uint32_t key_of(float score) {
  const std::uint32_t bits = __float_as_uint(__fadd_rn(score, 0.0F));
  return (bits & 0x80000000U) != 0 ? 0 - bits : bits + 0x80000001U;
}

// A thread's part of a row: kVectors times four columns, 128 apart. Behind the row's end stand NaN:
// being last they are never selected.
struct Held {
  std::uint32_t first;  // column
  std::uint32_t keys[kOwn];

  __device__ Held(const float* row, std::uint32_t length)
      : first(threadIdx.x * 4 + threadIdx.x / 32 * (32 * kOwn - 128)) {
    const bool aligned = reinterpret_cast<std::uintptr_t>(row) % sizeof(float4) == 0;
    const std::uint32_t whole = aligned ? length / 4 * 4 : 0;  // columns that vectors cover
    float scores[kOwn];
#pragma unroll
    for (float& score : scores) {
      score = std::numeric_limits<float>::quiet_NaN();
    }
#pragma unroll
    for (int i = 0; i < kOwn; i += 4) {
      if (column(i) < whole) {
        const float4 four = __ldcs(reinterpret_cast<const float4*>(row + column(i)));
        scores[i] = four.x;
        scores[i + 1] = four.y;
        scores[i + 2] = four.z;
        scores[i + 3] = four.w;
      }
    }
    if (whole < length) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        if (column(i) >= whole && column(i) < length) {
          scores[i] = row[column(i)];
        }
      }
    }
#pragma unroll
    for (int i = 0; i < kOwn; ++i) {
      keys[i] = key_of(scores[i]);
    }
  }

  __device__ std::uint32_t column(int i) const { return first + i / 4 * 128 + i % 4; }
};

// Steps 3 and 4: the smallest key that is selected.
template <int threads>
__device__ std::uint32_t find_kth(ShortShared<threads>& shared, Held& held, std::uint32_t wanted,
                                  std::uint32_t length) {
  using Radix = typename ShortShared<threads>::Radix;
  std::uint32_t below = kWarp;  // the smallest key but 0, less 1
  std::uint32_t largest = 0;
#pragma unroll
  for (const std::uint32_t key : held.keys) {
    below = min(below, key - 1);
    largest = max(largest, key);
  }
  Bucket keys = Radix::bracket_all(shared.radix, below + 1, largest, 0);
  do {
    keys = Radix::narrow(shared.radix, keys, wanted, [&](const auto& visitor) {
#pragma unroll
      for (const std::uint32_t key : held.keys) {
        visitor(key, true);
      }
    });
  } while (keys.above + keys.count != wanted && keys.reach != 0);
  if (keys.above + keys.count == wanted) {
    return keys.low;
  }
  const std::uint32_t plateau = keys.count != 0 ? keys.low : 0;  // NaN, where numbers are too few
  // Columns differ, so in the end a bin's are all wanted.
  Bucket places{~(length - 1), length - 1, keys.above, length};
  do {
    places = Radix::narrow(shared.radix, places, wanted, [&](const auto& visitor) {
#pragma unroll
      for (int i = 0; i < kOwn; ++i) {
        visitor(~held.column(i), held.keys[i] == plateau);
      }
    });
  } while (places.above + places.count != wanted);
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    if (held.keys[i] == plateau && ~held.column(i) >= places.low) {
      held.keys[i] = plateau + 1;
    }
  }
  return plateau + 1;
}

// Step 5, up to shared memory.
template <int threads>
__device__ void stage(ShortShared<threads>& shared, std::uint16_t* staged, const Held& held,
                      std::uint32_t cut) {
  // A byte for each vector: how many of it are selected. Sums over a warp are at most 128.
  constexpr int kWords = kVectors / 4;
  constexpr std::uint32_t kOnes = 0x01010101;
  const auto of_vector = [](const std::uint32_t(&counts)[kWords], int i) {
    return counts[i / 4] >> i % 4 * 8 & 0xFF;
  };
  const unsigned lane = threadIdx.x % 32;
  const unsigned warp = threadIdx.x / 32;
  std::uint32_t before[kWords];  // selected by lower lanes
  std::uint32_t all[kWords];     // by the warp
  std::uint32_t selected = 0;    // in all vectors
#pragma unroll
  for (int word = 0; word < kWords; ++word) {
    std::uint32_t own = 0;
#pragma unroll
    for (int i = 0; i < 16; ++i) {
      own += held.keys[word * 16 + i] >= cut ? 1U << i / 4 * 8 : 0;
    }
    std::uint32_t end = own;
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
      const std::uint32_t lower = __shfl_up_sync(kFullMask, end, step);
      end += lane >= step ? lower : 0;
    }
    before[word] = end - own;
    all[word] = __shfl_sync(kFullMask, end, 31);
    selected = __dp4a(all[word], kOnes, selected);
  }
  if (lane == 0) {
    shared.selected[warp] = selected;
  }
  __syncthreads();
  std::uint32_t start = __reduce_add_sync(kFullMask, lane < warp ? shared.selected[lane] : 0);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    std::uint16_t* place = staged + start + of_vector(before, i);
#pragma unroll
    for (int j = 4 * i; j < 4 * i + 4; ++j) {
      if (held.keys[j] >= cut) {
        *place++ = static_cast<std::uint16_t>(held.column(j));
      }
    }
    start += of_vector(all, i);
  }
  __syncthreads();
}

template <int threads>
__global__ void __launch_bounds__(threads, 1024 / threads)
    short_kernel(const Logits logits, const Keys keys, const Columns columns,
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
    Held held(row, length);
    const std::uint32_t cut = find_kth(shared, held, top_k, length);
    stage(shared, staged, held, cut);
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

template <int threads>
void launch_rows(const Logits& logits, const Keys& keys, const Columns& columns, int top_k,
                 const TopK& out, bool empty, void* stream) {
  const std::int64_t staged = std::min<std::int64_t>(top_k, logits.columns);
  const std::size_t bytes = sizeof(ShortShared<threads>) + sizeof(std::uint16_t) * staged;
  launch_kernel("selection", short_kernel<threads>, dim3(static_cast<unsigned>(logits.rows)),
                threads, bytes, stream, logits, keys, columns, static_cast<std::uint32_t>(top_k),
                out, empty);
}

}  // namespace

void launch_short(const Logits& logits, const Keys& keys, const Columns& columns, int top_k,
                  const TopK& out, bool empty, void* stream) {
  static_assert(kShortColumns == 512 * kOwn);
  if (logits.columns <= 128 * kOwn) {
    launch_rows<128>(logits, keys, columns, top_k, out, empty, stream);
  } else if (logits.columns <= 256 * kOwn) {
    launch_rows<256>(logits, keys, columns, top_k, out, empty, stream);
  } else {
    launch_rows<512>(logits, keys, columns, top_k, out, empty, stream);
  }
}

}  // namespace misa::cuda::select
