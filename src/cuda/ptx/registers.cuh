// SPDX-License-Identifier: Apache-2.0
// Moves registers between the warpgroups of a thread block (setmaxnreg). All warps of a warpgroup
// call it; `count`, the registers a thread has afterwards, is a multiple of 8.
#pragma once

namespace misa::cuda {

template <int count>
__device__ inline void give_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(count));
}

// Waits until so many are free.
template <int count>
__device__ inline void take_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(count));
}

}  // namespace misa::cuda
