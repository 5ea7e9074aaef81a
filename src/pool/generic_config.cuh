// SPDX-License-Identifier: Apache-2.0
// Sizes of the kernel of block means.
#pragma once

#include <cstdint>

#include "cuda/block_means.cuh"
#include "misa/types.hpp"

namespace misa::cuda::pool {

// Each half warp sums one group, so a thread block sums 16 groups at a time: a block of 1024 keys.
// 64K keys are 128 thread blocks where D = 128.
inline constexpr int kThreads = 256;
inline constexpr int kGroups = kThreads / kSumLanes;
inline constexpr int kGroup = static_cast<int>(kGroupSize);

// Rows of the table that a thread block fills.
__host__ __device__ constexpr int thread_block_rows(std::int32_t block) {
  return block < kGroups * kGroup ? kGroups * kGroup / block : 1;
}

// With three thread blocks per SM, the 320 thread blocks for 128K keys and 2048 queries run as one
// wave on 132 SMs. With fp32, keys in flight take too many registers for three.
template <DType type>
inline constexpr int kBlocksPerSm = type == DType::f32 ? 2 : 3;

// Keys in flight per lane. Fully unrolled, the loop over a group would be 30 KB of instructions,
// and warps would wait longer for instructions than for keys.
inline constexpr int kKeysInFlight = 16;

// Sums of groups in flight per lane, 16 bytes each: with 24 warps, 96 KB of an SM, three times what
// the latency of memory needs.
inline constexpr int kSumsInFlight = 8;

// Queries whose partial block means a thread block computes at most. Usually each sees one key more
// than the query before it, so that their keys end in one or two groups.
inline constexpr int kPartialQueries = 64;

// Groups of which a thread block keeps the sums after every key: those where these queries' keys
// end.
inline constexpr int kEndGroups = 2;

}  // namespace misa::cuda::pool
