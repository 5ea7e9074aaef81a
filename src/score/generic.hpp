// SPDX-License-Identifier: Apache-2.0
// Scores of queries for every CUDA device of compute capability 8.0 and above.
//
//   score = (sum over rows r of weight_r * max(floor_r, row_r . key)) * key scale
//
// The bits of a score depend only on its rows, their weights, the key and its scale.
#pragma once

#include "cuda/problem.hpp"
#include "misa/indexer.hpp"
#include "score/sketch_operands.hpp"

namespace misa::cuda::score {

// Rows are padded to groups of this many: the columns of one MMA.
inline constexpr std::int32_t kRowGroup = 8;

// The rows that score for each query, converted to operands in memory (the Hopper kernels gather
// ActiveRows instead): the active heads, ascending, then the rows without ReLU that add up to the
// residual row.
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

// The sizes for `heads` heads and, if `residual`, a residual row, which score a sketch of so many
// bits, or 0 for the keys themselves; the pointers are null.
RowOperands row_operands_for(const Shape& shape, std::int32_t heads, bool residual, int sketch);

// Fills the rows of every query: the active heads and residual row of `routing`, or all heads if it
// is null.
template <class Source>
void launch_row_operands(const ProblemOf<Source>& problem, const Routing* routing,
                         const RowOperands& rows, void* stream);

// The same from operands for a rotated sketch.
void launch_row_operands(const SketchOperands& operands, std::int64_t queries,
                         const RowOperands& rows, void* stream);

// Writes scores[t, c] for every column that stands for a position that query t sees, and nothing
// else. Queries that see at most `unscored` keys are skipped. Keys are scored by their sketch of
// `sketch` bits, which is computed where the source has none; 0: as they are.
template <class Source>
void launch_generic(const ProblemOf<Source>& problem, const RowOperands& rows,
                    const Columns& columns, std::int32_t unscored, int sketch, const Scores& scores,
                    void* stream);

}  // namespace misa::cuda::score
