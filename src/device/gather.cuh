// Asynchronous copies of what may not be there: zeros come in its place. Groups and waits are those
// of device/shared.cuh.
#pragma once

#include <cstdint>

#include "device/shared.cuh"

namespace misa::cuda {

// 16 aligned bytes from global memory, past L1. The address has to be valid in any case.
__device__ inline void copy_16_or_zero(void* shared, const void* global, bool there) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(there ? 16 : 0)
               : "memory");
}

// 4 bytes, through L1.
__device__ inline void copy_4_or_zero(void* shared, const void* global, bool there) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"(shared_address(shared)),
               "l"(global), "r"(there ? 4 : 0)
               : "memory");
}

}  // namespace misa::cuda
