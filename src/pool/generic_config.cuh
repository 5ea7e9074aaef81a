// SPDX-License-Identifier: Apache-2.0
// Sizes of the pool's kernel.
#pragma once

#include <cstdint>

#include "cuda/block_means.cuh"
#include "misa/types.hpp"

namespace misa::cuda::pool {

// Half a warp sums a page. A block of threads has 16 of them: the pages of one block of 1024
// positions, so that 64K keys are 128 blocks of threads where D = 128.
inline constexpr int kThreads = 256;
inline constexpr int kPages = kThreads / kLanes;

// So that 320 blocks of threads, 128K keys and 2048 queries, are one wave of 132 SMs; fp32 keys in
// flight take more registers than that leaves.
template <DType type>
inline constexpr int kBlocksPerSm = type == DType::f32 ? 2 : 3;

// Keys in flight a lane. A page unrolled whole is 30 KB of instructions, for which warps waited
// more than for keys.
inline constexpr int kInFlight = 16;

// Queries whose own means a block of threads computes: consecutive ones stand in one or two pages.
inline constexpr int kOwnQueries = 64;

// Pages of which the sums after every token are kept: as many as those queries stand in.
inline constexpr int kHosts = 2;

}  // namespace misa::cuda::pool
