// SPDX-License-Identifier: Apache-2.0
// Scoring fused with the gate of selection, for Hopper: e4m3 queries and keys whose rows start on
// 16 bytes, D = 128, at most kMaxRows rows a query and kMaxKeys keys. In order on a stream:
//
//   launch_scales      once a call
//   launch_samples     scores of the sampled keys
//   (a bound for every query, from them: select/fused.hpp)
//   launch_candidates  scores above the bounds
//   (the top k of the candidates: select/fused.hpp)
//   launch_missed      the top k of the queries whose bound misled, with the same bits
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/problem.hpp"
#include "fused/layout.hpp"
#include "misa/cuda.hpp"
#include "select/fused.hpp"

namespace misa::cuda::fused {

// What scores for a query. heads null: heads 0 … head_count - 1 of every query.
struct Rows {
  const std::int32_t* heads;  // [T, head_count]; negative: none
  int head_count;
  const std::uint8_t* residual;  // [T, D] e4m3, or null
  const float* residual_scale;   // [T]

  [[nodiscard]] int count() const { return head_count + (residual != nullptr ? 1 : 0); }
};

// The scale [scales(L)] of every key as scoring uses it: NaN where it is not finite, and behind the
// last one.
void launch_scales(const Keys& keys, float* scales, void* stream);

// Scores of the sampled keys, [T, samples]: of key c * sample_stride in column c; NaN where the
// query does not see it. `scales`, here and below: of all keys.
void launch_samples(const Problem& problem, const Rows& rows, const Layout& layout,
                    const float* scales, float* scores, void* stream);

// Candidates [T, lists, capacity]: the keys that the query sees whose score is above its bound
// [T].
void launch_candidates(const Problem& problem, const Rows& rows, const Layout& layout,
                       const float* scales, const float* bounds, const Candidates& out,
                       void* stream);

// The exact top k of the queries listed in `missed`, by scoring all keys that they see. `scores` is
// room for max_keys scores of at least one query; more of it lets more blocks work at once, up to
// one for each of the device's processors. Does next to nothing if none was missed.
void launch_missed(const Problem& problem, const Rows& rows, const float* scales,
                   const select::Misses& missed, int top_k, const TopK& out,
                   std::span<float> scores, int processors, void* stream);

}  // namespace misa::cuda::fused
