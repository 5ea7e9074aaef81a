// SPDX-License-Identifier: Apache-2.0
// Scoring in e4m3 for Hopper: queries and keys whose rows start on 16 bytes, D = 128, at most
// kMaxRows rows a query. The bits of a score are the same whichever of these kernels or of the
// fused ones (fused/sm90_fp8.hpp) computes it.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"

namespace misa::cuda::score {

// What scores for a query. heads null: heads 0 … head_count - 1 of every query.
struct ActiveRows {
  const std::int32_t* heads;  // [T, head_count]; negative: none
  int head_count;
  const std::uint8_t* residual;  // [T, D] e4m3, or null
  const float* residual_scale;   // [T]

  [[nodiscard]] int count() const { return head_count + (residual != nullptr ? 1 : 0); }
};

// Scales are prepared for whole tiles of this many keys, the largest of any of these kernels, so
// that none reads beyond them.
inline constexpr std::int64_t kScaleTile = 256;

// Elements of the scales of this many keys.
constexpr std::int64_t scale_count(std::int64_t keys) {
  return (keys + kScaleTile - 1) / kScaleTile * kScaleTile;
}

// The scale [scale_count(L)] of every key as scoring uses it: NaN where it is not finite, and
// behind the last one. Once a call.
void launch_scales(const Keys& keys, float* scales, void* stream);

// Gathered scoring. Writes scores[t, c] for the columns c below lengths[t], which stand for
// positions that query t sees, and nothing else. Queries that see no more than `unscored` keys are
// passed over. `columns` has a list; `scales`: of all keys (launch_scales); `num_sms`: of the
// device.
void launch_gathered(const Problem& problem, const ActiveRows& rows, const Columns& columns,
                     const std::int32_t* lengths, std::int32_t unscored, const float* scales,
                     const Scores& scores, int num_sms, void* stream);

}  // namespace misa::cuda::score
