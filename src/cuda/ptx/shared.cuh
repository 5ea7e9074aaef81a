// SPDX-License-Identifier: Apache-2.0
// Shared memory: asynchronous copies into it (cp.async), and matrix fragments from it (ldmatrix).
#pragma once

#include <cstdint>

namespace misa::cuda {

__device__ inline std::uint32_t shared_address(const void* pointer) {
  return static_cast<std::uint32_t>(__cvta_generic_to_shared(pointer));
}

// Starts an asynchronous copy of 16 aligned bytes from global memory.
__device__ inline void copy_16(void* shared, const void* global) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(shared)),
               "l"(global)
               : "memory");
}

// The same for 4 bytes.
__device__ inline void copy_4(void* shared, const void* global) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(shared_address(shared)), "l"(global)
               : "memory");
}

// Makes a group of the copies that this thread started since its last group.
__device__ inline void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits until at most the last `pending` groups of this thread are unfinished.
template <int pending>
__device__ inline void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(pending) : "memory");
}

// Loads four 8 x 8 matrices of 16-bit elements. Lane l passes the address of row l % 8 of matrix l
// / 8, and gets elements 2 * (l % 4) and 2 * (l % 4) + 1 of row l / 4 of each matrix.
__device__ inline void load_matrices(std::uint32_t (&m)[2][2], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(m[0][0]), "=r"(m[0][1]), "=r"(m[1][0]), "=r"(m[1][1])
               : "r"(shared_address(row))
               : "memory");
}

}  // namespace misa::cuda
