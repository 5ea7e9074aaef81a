// SPDX-License-Identifier: Apache-2.0
// Routing of one query for the CPU backend: the values of heads, and the residual row. Keys and
// block means come as tiles.
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
  float rms;  // of all elements of these keys
};

// The value of every head, by which a router chooses: values[H]. fit_heads writes the fits that
// nonlinearity_values and the residual row need. `dots`: scratch of H * 128 floats.
void pooled_values(const Kernels& kernels, const Heads& heads, const BlockMeans& means, float* dots,
                   float* values);
void self_values(const Kernels& kernels, const Heads& heads, const Tile& last, float* dots,
                 float* values);
void fit_heads(const Kernels& kernels, const Heads& heads, const Samples& samples, float* dots,
               const HeadFit& fit);
void nonlinearity_values(const Kernels& kernels, const Problem& problem, std::int64_t t,
                         const Heads& heads, const HeadFit& fit, float rms, float* values);

// row[D] = sum of w_j slope_j q_j over the heads j that are not in `active`, which is ascending.
void residual_row(const Kernels& kernels, const Problem& problem, std::int64_t t,
                  std::span<const std::int32_t> active, const float* slope, float* row);

// Writes operand rows whose sum times `weight` is the residual row, and returns how many. For e4m3
// keys that is the row rounded to e4m3 with one scale, else exactly the row. `rows` has room for
// kMaxResidualRows * D operands.
inline constexpr int kMaxResidualRows = 3;
int split_residual(std::span<const float> row, DType k_dtype, Operand operand, void* rows,
                   float& weight);

}  // namespace misa::cpu
