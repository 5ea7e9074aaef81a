// SPDX-License-Identifier: Apache-2.0
// Named barriers among some threads of a thread block (barrier 0 is the one that __syncthreads
// uses), and the election of one lane of a warp.
#pragma once

#include <cstdint>

namespace misa::cuda {

__device__ inline void barrier_sync(int barrier, int threads) {
  asm volatile("barrier.sync %0, %1;" ::"r"(barrier), "r"(threads) : "memory");
}

// True in one lane of a warp, all of whose lanes call.
__device__ inline bool elect_lane() {
  std::uint32_t elected;
  asm volatile("{\n.reg .pred p;\nelect.sync _|p, 0xffffffff;\nselp.b32 %0, 1, 0, p;\n}\n"
               : "=r"(elected));
  return elected != 0;
}

}  // namespace misa::cuda
