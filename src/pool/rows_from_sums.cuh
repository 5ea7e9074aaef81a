// SPDX-License-Identifier: Apache-2.0
// Rows of the block-mean table of paged keys from the sums that their cache keeps.
//  1. Each thread counts the rows of some sequences. A scan over these counts gives every warp of
//     the grid an equal share of all rows, however the lengths of sequences differ.
//  2. A warp adds up the sums of a block's groups and writes the mean.
#pragma once

#include <cstdint>

#include "cuda/block_means.cuh"
#include "cuda/key_source.cuh"
#include "cuda/warp.cuh"
#include "pool/generic_config.cuh"

namespace misa::cuda::pool {

struct RowCounts {
  std::int32_t rows_before[kThreads + 1];  // of a thread's first sequence; last: all rows
  std::int32_t warp_rows[kThreads / 32];
};

// How many rows of the table a sequence has.
__device__ inline std::int32_t rows_of(const DevicePagedSource& keys, std::int64_t tokens,
                                       const BlockMeanTable& means, std::int32_t sequence) {
  const std::int32_t first_row = base_row(means, sequence << keys.sequence_bits);
  return max(0, min(longest_row(keys, tokens, sequence) / means.block, means.capacity - first_row));
}

// Step 1. Thread i has `each` sequences from i * each on.
__device__ inline void count_rows(RowCounts& counts, const DevicePagedSource& keys,
                                  std::int64_t tokens, const BlockMeanTable& means,
                                  std::int32_t each) {
  const int thread = static_cast<int>(threadIdx.x);
  const int lane = thread % 32;
  std::int32_t rows = 0;
  for (std::int32_t i = 0; i < each && thread * each + i < keys.sequences; ++i) {
    rows += rows_of(keys, tokens, means, thread * each + i);
  }
  std::int32_t sum = rows;  // of the warp's lanes up to this one
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    const std::int32_t other = __shfl_up_sync(kFullMask, sum, step);
    sum += lane >= step ? other : 0;
  }
  if (lane == 31) {
    counts.warp_rows[thread / 32] = sum;
  }
  __syncthreads();
  for (int warp = 0; warp < thread / 32; ++warp) {
    sum += counts.warp_rows[warp];
  }
  counts.rows_before[thread] = sum - rows;
  if (thread == kThreads - 1) {
    counts.rows_before[kThreads] = sum;
  }
  __syncthreads();
}

__device__ inline void fill_rows_from_sums(RowCounts& counts, const DevicePagedSource& keys,
                                           std::int64_t tokens, const BlockMeanTable& means,
                                           std::int32_t thread_block, std::int32_t thread_blocks) {
  constexpr int kWarps = kThreads / 32;
  const std::int32_t each = (keys.sequences + kThreads - 1) / kThreads;
  count_rows(counts, keys, tokens, means, each);
  const int warp = thread_block * kWarps + static_cast<int>(threadIdx.x) / 32;
  for (std::int32_t i = warp; i < counts.rows_before[kThreads]; i += thread_blocks * kWarps) {
    int owner = 0;  // the last thread that has no more than i rows before its first one
    for (int step = kThreads / 2; step > 0; step /= 2) {
      owner += counts.rows_before[owner + step] <= i ? step : 0;
    }
    std::int32_t sequence = owner * each;
    std::int32_t block = i - counts.rows_before[owner];
    for (std::int32_t rows = rows_of(keys, tokens, means, sequence); block >= rows;) {
      block -= rows;
      rows = rows_of(keys, tokens, means, ++sequence);
    }
    const std::int32_t start = sequence << keys.sequence_bits;
    const std::int64_t row = std::int64_t{base_row(means, start)} + block;
    const GroupSum sum = sum_block<kSumsInFlight>(keys, start + std::int64_t{block} * means.block,
                                                  means.block / kGroupSize, mean_column(means));
    const auto write = [&]<bool fp16>() {
      return write_mean_of<fp16>(sum, means, means.rows + row * kMeanParts<fp16> * means.dim,
                                 means.dim);
    };
    const float factor =
        means.fp16 ? write.template operator()<true>() : write.template operator()<false>();
    if (threadIdx.x % 32 == 0) {
      means.factors[row] = factor;
      means.starts[row] = start;
    }
  }
}

}  // namespace misa::cuda::pool
