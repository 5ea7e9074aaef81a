// SPDX-License-Identifier: Apache-2.0
// Named barriers among some threads of a thread block. Barrier 0 is the one that __syncthreads
// uses.
#pragma once

namespace misa::cuda {

__device__ inline void barrier_sync(int barrier, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

}  // namespace misa::cuda
