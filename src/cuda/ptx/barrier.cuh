// SPDX-License-Identifier: Apache-2.0
// Barriers among some of a block's threads, by number: 0 is __syncthreads's.
#pragma once

namespace misa::cuda {

__device__ inline void barrier_sync(int barrier, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace misa::cuda
