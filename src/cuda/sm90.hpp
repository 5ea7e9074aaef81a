// SPDX-License-Identifier: Apache-2.0
// Which problems the kernels for Hopper (sm90_*) can compute.
#pragma once

#include "cuda/problem.hpp"
#include "cuda/target.hpp"

namespace misa::cuda {

inline constexpr int kDim = 128;     // D, so that an e4m3 row is the 128 bytes of one swizzle
inline constexpr int kMaxRows = 64;  // the most rows of one query: heads and a residual row

// Whether the kernels that multiply this many rows of a query can: e4m3 queries and keys, D = 128
// and at most 64 rows, on Hopper.
inline bool sm90_can_implement(const DeviceTraits& device, DType q_dtype, DType k_dtype,
                               std::int64_t dim, std::int64_t rows) {
  return device.matrix == MatrixInstructions::wgmma && q_dtype == DType::e4m3 &&
         k_dtype == DType::e4m3 && dim == kDim && rows <= kMaxRows;
}

// The same for all heads of a problem.
template <class Source>
bool sm90_can_implement(const ProblemOf<Source>& problem, const DeviceTraits& device) {
  return sm90_can_implement(device, problem.q.dtype, problem.k.dtype, problem.q.dim,
                            problem.q.heads);
}

}  // namespace misa::cuda
