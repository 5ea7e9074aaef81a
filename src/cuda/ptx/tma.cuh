// SPDX-License-Identifier: Apache-2.0
// Bulk copies into shared memory by the copy engine (TMA), which complete on an mbarrier. Their
// data is read once, so they ask the L2 cache to evict it first.
#pragma once

#include <cuda.h>

#include <cstdint>

#include "cuda/ptx/shared.cuh"

namespace misa::cuda {

// The L2 policy of data that is read once.
__device__ inline std::uint64_t evict_first_policy() {
  std::uint64_t policy;
  asm("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(policy));
  return policy;
}

// Copies the box at (0, row, page) of a tensor of three dimensions.
__device__ inline void copy_box(void* shared, const CUtensorMap& map, std::int32_t row,
                                std::int32_t page, std::uint64_t* barrier, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.tensor.3d.shared::cluster.global.tile.mbarrier::complete_tx::bytes"
      ".L2::cache_hint [%0], [%1, {%2, %3, %4}], [%5], %6;" ::"r"(shared_address(shared)),
      "l"(&map), "r"(0), "r"(row), "r"(page), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

// Copies `bytes` from global memory; both addresses and the size are multiples of 16.
__device__ inline void copy_bulk(void* shared, const void* global, std::uint32_t bytes,
                                 std::uint64_t* barrier, std::uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint "
      "[%0], [%1], %2, [%3], %4;" ::"r"(shared_address(shared)),
      "l"(global), "r"(bytes), "r"(shared_address(barrier)), "l"(policy)
      : "memory");
}

}  // namespace misa::cuda
