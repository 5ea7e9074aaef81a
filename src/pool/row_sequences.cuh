// SPDX-License-Identifier: Apache-2.0
// Which sequence a row of the block-mean table of ragged keys belongs to: of the sequences that
// start before key (r + 1) * block, the one that starts last; of several with that start, the
// longest.
#pragma once

#include <cstdint>

#include "cuda/block_means.cuh"
#include "cuda/key_source.cuh"
#include "cuda/warp.cuh"
#include "pool/generic_config.cuh"

namespace misa::cuda::pool {

// The rank of a sequence: larger if it starts later or, of equal starts, is longer. 0: no sequence.
using SequenceRank = unsigned long long;

__device__ inline SequenceRank rank_of(Range range) {
  return (SequenceRank{static_cast<std::uint32_t>(range.start)} + 1) << 32 |
         static_cast<std::uint32_t>(range.length);
}

// The largest rank of the warp's lanes.
__device__ inline SequenceRank warp_max(SequenceRank lane_rank) {
  const auto high = static_cast<std::uint32_t>(lane_rank >> 32);
  const std::uint32_t max_high = __reduce_max_sync(kFullMask, high);
  const auto low = high == max_high ? static_cast<std::uint32_t>(lane_rank) : 0;
  return SequenceRank{max_high} << 32 | __reduce_max_sync(kFullMask, low);
}

// The thread block's rows are counted from 0.
struct RowSequences {
  SequenceRank before[kThreads / 32];  // per warp: the largest that starts before row 1
  SequenceRank row_ranks[kGroups];     // per row from 1 on: the largest that starts in it
  std::int64_t tokens[kGroups];        // first key of a row's block; -1: there is none
};

// A row belongs to the sequence of the largest rank among those that start in it
// or in an earlier row. Few thread blocks have a sequence that starts after their first row; these
// read the queries once more.
__device__ inline void find_row_sequences(RowSequences& shared, const DeviceRaggedSource& keys,
                                          std::int64_t tokens, const BlockMeanTable& means,
                                          std::int64_t first_row) {
  constexpr int kQueriesInFlight = 8;
  const int rows = thread_block_rows(means.block);
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t row_1 = (first_row + 1) * means.block;  // first key of the second row
  const std::int64_t end = (first_row + rows) * means.block;
  if (thread < kGroups) {
    shared.row_ranks[thread] = 0;
  }
  SequenceRank before = 0;
  bool starts_later = false;  // a sequence starts after the first row
  for (std::int64_t t0 = thread; t0 < tokens; t0 += kQueriesInFlight * kThreads) {
    Range range[kQueriesInFlight];
#pragma unroll
    for (int i = 0; i < kQueriesInFlight; ++i) {
      range[i] = visible(keys, min(t0 + i * kThreads, tokens - 1));
    }
#pragma unroll
    for (int i = 0; i < kQueriesInFlight; ++i) {
      const bool at_first_row = range[i].start < row_1;
      before = at_first_row ? max(before, rank_of(range[i])) : before;
      starts_later = starts_later || (!at_first_row && range[i].start < end);
    }
  }
  before = warp_max(before);
  if (thread % 32 == 0) {
    shared.before[thread / 32] = before;
  }
  starts_later = __syncthreads_or(static_cast<int>(starts_later)) != 0;
  if (starts_later) {
    for (std::int64_t t = thread; t < tokens; t += kThreads) {
      const Range range = visible(keys, t);
      if (row_1 <= range.start && range.start < end) {
        atomicMax(&shared.row_ranks[base_row(means, range.start) - first_row], rank_of(range));
      }
    }
    __syncthreads();
  }
  if (thread < rows) {
    SequenceRank rank = 0;
#pragma unroll
    for (const SequenceRank warp_rank : shared.before) {
      rank = max(rank, warp_rank);
    }
    for (int i = 1; starts_later && i <= thread; ++i) {
      rank = max(rank, shared.row_ranks[i]);
    }
    const auto start = static_cast<std::int32_t>((rank >> 32) - 1);  // -1: none
    const auto length = static_cast<std::int32_t>(rank & 0xFFFFFFFF);
    const std::int64_t block = first_row + thread - base_row(means, start);
    const bool exists = start >= 0 && block < length / means.block;
    shared.tokens[thread] = exists ? start + block * means.block : -1;
    if (first_row + thread < means.capacity) {
      means.starts[first_row + thread] = exists ? start : -1;
    }
  }
  __syncthreads();
}

}  // namespace misa::cuda::pool
