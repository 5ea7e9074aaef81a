// SPDX-License-Identifier: Apache-2.0
// Scores of queries for every CUDA device of compute capability 8.0 and above.
//
//   score = (sum over rows r of weight_r * max(floor_r, row_r . key)) * key scale
//
// The bits of a score are a function of its rows, their weights, the key and its scale alone.
#pragma once

#include "cuda/problem.hpp"
#include "misa/indexer.hpp"

namespace misa::cuda::score {

// Rows stand in groups of this many: the columns of one matrix product.
inline constexpr std::int32_t kRowGroup = 8;

// What scores for each query, as operands of the products: the active heads, ascending, then the
// rows without ReLU that make up the residual row.
struct RowOperands {
  void* data;           // [T, padded(), D]
  float* weight;        // [T, padded()]
  DType operand;        // bf16 for the tensor cores; f32 where q or k is
  std::int32_t dim;     // D
  std::int32_t heads;   // rows with ReLU
  std::int32_t linear;  // rows without

  [[nodiscard]] constexpr std::int32_t padded() const {
    return (heads + linear + kRowGroup - 1) / kRowGroup * kRowGroup;
  }
};

// Rows without memory, for `heads` heads and perhaps a residual row.
RowOperands row_operands_for(const Shape& shape, std::int32_t heads, bool residual);

// Fills the rows of every query: all heads without `routing`.
void launch_row_operands(const Problem& problem, const Routing* routing, const RowOperands& rows,
                         void* stream);

// Writes scores[t, c] for every column that stands for a position that query t sees, and nothing
// else. Queries that see no more than `unscored` keys are passed over.
void launch_generic(const Problem& problem, const RowOperands& rows, const Columns& columns,
                    std::int32_t unscored, const Scores& scores, void* stream);

}  // namespace misa::cuda::score
