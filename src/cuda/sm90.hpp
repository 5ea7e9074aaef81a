// SPDX-License-Identifier: Apache-2.0
// What the kernels for Hopper (sm90_*) can implement.
#pragma once

#include "cuda/problem.hpp"
#include "cuda/target.hpp"

namespace misa::cuda {

inline constexpr int kDim = 128;     // D, so that an e4m3 row is the 128 bytes of one swizzle
inline constexpr int kMaxRows = 64;  // of a query in one product: heads and a residual row

// Whether the kernels that multiply all heads of a query can: e4m3 queries and keys, D = 128 and at
// most 64 heads, on Hopper.
inline bool sm90_can_implement(const Problem& problem, const DeviceTraits& device) {
  return device.matrix == MatrixInstructions::wgmma && problem.q.dtype == DType::e4m3 &&
         problem.k.dtype == DType::e4m3 && problem.q.dim == kDim && problem.q.heads <= kMaxRows;
}

}  // namespace misa::cuda
