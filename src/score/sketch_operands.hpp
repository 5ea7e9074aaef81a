// SPDX-License-Identifier: Apache-2.0
// The rows that score a sketch of the keys, in e4m3, with the bits that the CPU's have.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"

namespace misa::cuda::score {

// For each query its active heads, ascending, and the residual row, if there is one:
//
//   score = (sum over heads of factor * max(0, row . key) + residual_factor * residual . key)
//           * the key's factor
struct SketchOperands {
  std::uint8_t* rows;       // [T, heads, D] e4m3; 0 where there is no head
  float* factors;           // [T, heads]: a head's weight times the row's scale; 0 if there is none
  std::uint8_t* residual;   // [T, D] e4m3, or null
  float* residual_factors;  // [T]
  std::int32_t dim;         // D
  std::int32_t heads;
  bool sm90;  // whether entries are in the order in which Hopper multiplies (sketch_order.hpp)
};

// Fills the operands of every query: the active heads and residual row of `routing`, or all heads
// if it is null. Rows for a rotated sketch are rotated, then rounded. Others are copied: q is e4m3
// then.
void launch_sketch_operands(const Queries& q, const Weights& w, const Routing* routing, int sketch,
                            const SketchOperands& operands, void* stream);

}  // namespace misa::cuda::score
