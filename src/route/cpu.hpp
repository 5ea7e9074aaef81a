// SPDX-License-Identifier: Apache-2.0
// Choosing the heads, the residual row and the blocks of one query, for the CPU backend. The keys
// that a router looks at come as tiles; here is only what is done with them.
#pragma once

#include <cstdint>
#include <span>

#include "dispatch/cpu_kernels.hpp"
#include "indexers/problem.hpp"

namespace misa::cpu {

// All heads of one query.
struct Heads {
  const void* rows;       // [H][D] operands
  const float* rows_f32;  // [H][D]; only where block means are met
  const float* weight;    // [H]
  int count;              // H
  Operand operand;
};

// Blocks that a query sees: tiles of the means of whole blocks, and the mean of the block it
// stands in (null if it ends with one).
struct BlockMeans {
  std::span<const Tile> whole;
  std::int64_t whole_count;
  const Tile* partial;
};

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

// scores[blocks] of the block filter: score over all heads of each block mean.
void block_scores(const Kernels& kernels, const Heads& heads, const BlockMeans& means,
                  float* scores);

}  // namespace misa::cpu
