// SPDX-License-Identifier: Apache-2.0
// The rows that score a sketch of the keys, in e4m3, with the bits that the CPU's have.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"

namespace misa::cuda::score {

// For each query its active heads, ascending, then the residual row, if there is one:
//
//   score = (sum over rows r of factor_r * max(floor_r, row_r . key)) * the key's factor
struct SketchOperands {
  std::uint8_t* rows;  // [T, count(), D] e4m3; 0 where there is no head
  float* factors;      // [T, count()]: a head's weight times the row's scale; 0 where there is none
  std::int32_t dim;    // D
  std::int32_t heads;  // rows with ReLU
  bool residual;       // whether a row without follows them

  [[nodiscard]] constexpr std::int32_t count() const { return heads + (residual ? 1 : 0); }
};

// Fills the operands of every query: the active heads and residual row of `routing`, or all heads
// if it is null. Rows for a rotated sketch are rotated, then rounded. Others are copied: q is e4m3
// then.
void launch_sketch_operands(const Queries& q, const Weights& w, const Routing* routing, int sketch,
                            const SketchOperands& operands, void* stream);

}  // namespace misa::cuda::score
