// SPDX-License-Identifier: Apache-2.0
// Scoring fused with the gate of selection, for Hopper: e4m3 queries and keys whose rows start on
// 16 bytes, D = 128, at most kMaxRows rows a query and kMaxKeys keys. In order on a stream:
//
//   (score::launch_scales, once a call)
//   launch_samples     scores of the sampled keys
//   (a threshold for every query, from them: select/fused.hpp)
//   launch_candidates  scores above the thresholds
//   (the top k of the candidates: select/fused.hpp)
//   launch_fallback      the top k of the queries whose threshold misled, with the same bits
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/problem.hpp"
#include "fused/work_plan.hpp"
#include "misa/cuda.hpp"
#include "score/sm90_fp8.hpp"
#include "select/fused.hpp"

namespace misa::cuda::fused {

// Scores of the sampled keys, [T, samples]: of key c * sample_stride in column c; NaN where the
// query does not see it. `scales`, here and below: of all keys.
void launch_samples(const Problem& problem, const score::ActiveRows& rows, const WorkPlan& layout,
                    const float* scales, float* scores, void* stream);

// Candidates [T, lists, capacity]: the keys that the query sees whose score is above its threshold
// [T].
void launch_candidates(const Problem& problem, const score::ActiveRows& rows,
                       const WorkPlan& layout, const float* scales, const float* thresholds,
                       const Candidates& out, void* stream);

// The exact top k of the queries listed in `fallback`, by scoring all keys that they see. `scores`
// is room for max_keys scores of at least one query; more of it lets more blocks work at once, up
// to one for each of the device's num_sms. Does next to nothing if none was fallback.
void launch_fallback(const Problem& problem, const score::ActiveRows& rows, const float* scales,
                     const select::FallbackRows& fallback, int top_k, const TopK& out,
                     std::span<float> scores, int num_sms, void* stream);

}  // namespace misa::cuda::fused
