// SPDX-License-Identifier: Apache-2.0
// Scoring in e4m3 for Hopper: queries and keys whose rows are aligned to 16 bytes, D = 128, at most
// kMaxRows rows per query. These kernels and the fused ones (fused/sm90_fp8.hpp) give a score the
// same bits.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"
#include "score/sketch_operands.hpp"

namespace misa::cuda::score {

// The rows that score for each query: heads of q, or heads 0 … head_count - 1 of every query if
// `heads` is null, and the residual row. The Hopper kernels gather these rows as they load them;
// the generic kernels have RowOperands instead.
struct ActiveRows {
  const std::int32_t* heads;  // [T, head_count]; negative: no head
  int head_count;
  const std::uint8_t* residual;  // [T, D] e4m3, or null
  const float* residual_scale;   // [T]

  [[nodiscard]] int count() const { return head_count + (residual != nullptr ? 1 : 0); }
};

// The operands of a sketch as rows that these kernels score: the queries of a problem with the same
// keys, and the rows of which all are active.
template <class Source>
ProblemOf<Source> rows_problem(ProblemOf<Source> problem, const SketchOperands& operands) {
  const std::int64_t heads = operands.heads;
  const std::int64_t dim = operands.dim;
  problem.q = {operands.rows, DType::e4m3, problem.q.tokens, heads, dim, heads * dim, dim};
  problem.w = {operands.factors, problem.q.tokens, heads, heads};
  return problem;
}
inline ActiveRows rows_of(const SketchOperands& operands) {
  return {nullptr, operands.heads, operands.residual, operands.residual_factors};
}

// Scales are padded to a multiple of this many, the largest key tile of these kernels, so that no
// tile reads beyond them.
inline constexpr std::int64_t kScaleTile = 256;

// The number of scales for `keys` keys, with the padding.
constexpr std::int64_t scale_count(std::int64_t keys) {
  return (keys + kScaleTile - 1) / kScaleTile * kScaleTile;
}

// Writes scales [scale_count(L)]: the scale of every key, or NaN if it is not finite; NaN in the
// padding. One launch per call is enough for all kernels that take `scales`.
void launch_scales(const DeviceRaggedSource& keys, float* scales, void* stream);

// Gathered scoring: writes scores[t, c] for the columns c < lengths[t], which stand for positions
// that query t sees, and nothing else. Queries that see at most `unscored` keys are skipped.
// `columns` has a list; `scales` are those of all ragged keys (launch_scales), and null for paged
// keys, of which the cache has fewer than 2^32.
template <class Source>
void launch_gathered(const ProblemOf<Source>& problem, const ActiveRows& rows,
                     const Columns& columns, const std::int32_t* lengths, std::int32_t unscored,
                     const float* scales, const Scores& scores, int num_sms, void* stream);

}  // namespace misa::cuda::score
