// SPDX-License-Identifier: Apache-2.0
// Choosing the heads and the residual row of one query, for the CPU backend. The keys
// that a router looks at come as tiles; here is only what is done with them.
#pragma once

#include <cstdint>
#include <span>

#include "core/problem.hpp"
#include "cpu/heads.hpp"
#include "cpu/kernels.hpp"

namespace misa::cpu {

// The sampled keys that a query sees.
struct Samples {
  std::span<const Tile> tiles;
  int count;
  float rms;  // of the entries of these keys
};

// values[H] of the routers; `dots` holds H * 128 floats.
void pooled_values(const Kernels& kernels, const Heads& heads, const BlockMeans& means, float* dots,
                   float* values);
void self_values(const Kernels& kernels, const Heads& heads, const Tile& last, float* dots,
                 float* values);
void fit_heads(const Kernels& kernels, const Heads& heads, const Samples& samples, float* dots,
               const HeadFit& fit);
void nonlinearity_values(const Kernels& kernels, const Problem& problem, std::int64_t t,
                         const Heads& heads, const HeadFit& fit, float rms, float* values);

// row[D] = sum over the heads not in `active` (ascending) of w_j slope_j q_j.
void residual_row(const Kernels& kernels, const Problem& problem, std::int64_t t,
                  std::span<const std::int32_t> active, const float* slope, float* row);

// Rows of operands whose sum is the residual row: rounded to e4m3 with one scale where keys are
// e4m3; otherwise exactly the row. `rows` holds kMaxResidualRows * D operands; returns how many
// were written and sets the weight that they share.
inline constexpr int kMaxResidualRows = 3;
int split_residual(std::span<const float> row, DType k_dtype, Operand operand, void* rows,
                   float& weight);

}  // namespace misa::cpu
