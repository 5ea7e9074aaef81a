// SPDX-License-Identifier: Apache-2.0
// The rotation of rows by the Sylvester-Hadamard matrix, as core/sketch.hpp has it.
#pragma once

#include "cuda/warp.cuh"

namespace misa::cuda {

// Replaces a row of a warp by its product with the matrix of ±1. Lane l has elements `count` l …
// `count` l + count - 1. Sums are those of misa::hadamard, bit for bit.
template <class T, int count>
__device__ inline void warp_hadamard(T (&row)[count]) {
#pragma unroll
  for (int stride = 1; stride < count; stride *= 2) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      if ((i & stride) == 0) {
        const T sum = row[i] + row[i + stride];
        row[i + stride] = row[i] - row[i + stride];
        row[i] = sum;
      }
    }
  }
#pragma unroll
  for (int stride = 1; stride < 32; stride *= 2) {
    const bool upper = (static_cast<int>(threadIdx.x) & stride) != 0;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const T other = __shfl_xor_sync(kFullMask, row[i], stride);
      row[i] = upper ? other - row[i] : row[i] + other;
    }
  }
}

}  // namespace misa::cuda
