// SPDX-License-Identifier: Apache-2.0
// Scoring fused with the gate of selection, for Hopper: e4m3 queries and keys whose rows are
// aligned to 16 bytes, D = 128, at most kMaxRows rows per query and kMaxKeys keys. In order on a
// stream:
//
//   (score::launch_scales, once per call)
//   launch_samples     scores of the sampled keys
//   (a gate threshold for each query, from these scores: select/gate.hpp)
//   launch_candidates  scores above the thresholds
//   (the top k of the candidates: select/gate.hpp)
//   launch_fallback    the top k of the queries whose candidates do not suffice, with the same bits
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/problem.hpp"
#include "cuda/target.hpp"
#include "fused/work_plan.hpp"
#include "misa/cuda.hpp"
#include "score/sm90_fp8.hpp"
#include "select/gate.hpp"

namespace misa::cuda::fused {

// Writes scores [T, samples] of the sampled keys: column c is key c * sample_stride, NaN if the
// query does not see it. `scales` here and below are those of all keys.
void launch_samples(const Problem& problem, const score::ActiveRows& rows, const WorkPlan& plan,
                    const float* scales, float* scores, void* stream);

// Writes the candidates [T, lists, capacity]: for each query t, the keys that it sees whose scores
// exceed thresholds[t].
void launch_candidates(const Problem& problem, const score::ActiveRows& rows, const WorkPlan& plan,
                       const float* scales, const float* thresholds, const Candidates& out,
                       void* stream);

// Writes the exact top k of the queries in `fallback`, by scoring all keys that they see. `scores`
// is scratch memory for the max_keys scores of at least one query; more scratch memory lets more
// thread blocks work at once, up to one per SM. Takes almost no time if there are no such queries.
void launch_fallback(const Problem& problem, const score::ActiveRows& rows, const float* scales,
                     const select::FallbackRows& fallback, int top_k, const TopK& out,
                     std::span<float> scores, const DeviceTraits& device, void* stream);

}  // namespace misa::cuda::fused
