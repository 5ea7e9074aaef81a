// SPDX-License-Identifier: Apache-2.0
// The rows of the block-mean table of paged keys: those of all sequences, one sequence after the
// other, as many as they have whole blocks. So sequences that are shorter than the plan allows take
// no memory, and thread blocks share the rows equally, however lengths differ.
//
// Where the cache keeps the sums of groups, a warp adds up those of a block and writes the mean.
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

// A whole block of a sequence.
struct SequenceBlock {
  std::int32_t start;  // first key of the sequence
  std::int32_t block;
};

// Thread i counts the rows of `each` sequences, from i * each on.
class PagedRows {
 public:
  // Counts the rows of all sequences. All threads of a thread block call.
  __device__ PagedRows(RowCounts& counts, const DevicePagedSource& keys, std::int64_t tokens,
                       const BlockMeanTable& means)
      : counts_(counts),
        keys_(keys),
        tokens_(tokens),
        means_(means),
        each_((keys.sequences + kThreads - 1) / kThreads) {
    const int thread = static_cast<int>(threadIdx.x);
    const int lane = thread % 32;
    const std::int32_t first = min(thread * each_, keys.sequences);
    const std::int32_t end = min(first + each_, keys.sequences);
    std::int32_t rows = 0;
    for (std::int32_t sequence = first; sequence < end; ++sequence) {
      rows += rows_of(sequence);
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

  // Rows that the table has.
  [[nodiscard]] __device__ std::int32_t count() const {
    return min(counts_.rows_before[kThreads], means_.capacity);
  }

  // Writes the first row of every sequence for the kernels that read the table.
  __device__ void write_bases() const {
    const int thread = static_cast<int>(threadIdx.x);
    const std::int32_t first = min(thread * each_, keys_.sequences);
    const std::int32_t end = min(first + each_, keys_.sequences);
    std::int32_t base = counts_.rows_before[thread];
    for (std::int32_t sequence = first; sequence < end; ++sequence) {
      means_.bases[sequence] = base;
      base += rows_of(sequence);
    }
  }

  // The block of row `row`, which is below count().
  [[nodiscard]] __device__ SequenceBlock block_of(std::int32_t row) const {
    int owner = 0;  // the last thread that has no more than `row` rows before its first one
#pragma unroll
    for (int step = kThreads / 2; step > 0; step /= 2) {
      owner += counts_.rows_before[owner + step] <= row ? step : 0;
    }
    std::int32_t sequence = owner * each_;
    std::int32_t block = row - counts_.rows_before[owner];
    for (std::int32_t rows = rows_of(sequence); block >= rows;) {
      block -= rows;
      rows = rows_of(++sequence);
    }
    return {sequence << keys_.sequence_bits, block};
  }

 private:
  [[nodiscard]] __device__ std::int32_t rows_of(std::int32_t sequence) const {
    return longest_row(keys_, tokens_, sequence) / means_.block;
  }

  const RowCounts& counts_;
  const DevicePagedSource& keys_;
  std::int64_t tokens_;
  const BlockMeanTable& means_;
  std::int32_t each_;
};

// Writes every `warps`-th row from `warp` on, from the sums that the cache keeps.
__device__ inline void fill_rows_from_sums(const PagedRows& rows, const DevicePagedSource& keys,
                                           const BlockMeanTable& means, std::int32_t warp,
                                           std::int32_t warps) {
  for (std::int32_t row = warp; row < rows.count(); row += warps) {
    const auto [start, block] = rows.block_of(row);
    const GroupSum sum = sum_block<kSumsInFlight>(keys, start + std::int64_t{block} * means.block,
                                                  means.block / kGroupSize, mean_column(means));
    const auto write = [&]<bool fp16>() {
      return write_mean_of<fp16>(
          sum, means, means.rows + std::int64_t{row} * kMeanParts<fp16> * means.dim, means.dim);
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
