// SPDX-License-Identifier: Apache-2.0
// Scores of all keys in the pages of a cache, for Hopper. Scores have the bits of the other e4m3
// kernels (score/sm90_fp8.hpp).
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"
#include "score/columns.hpp"
#include "score/sketch_operands.hpp"
#include "score/sm90_fp8.hpp"

namespace misa::cuda::score {

// Writes scores[t, p] for every query t and every position p that it sees, and how long the rows
// are. Rows of queries that see at most `unscored` keys may be left as they are. Uses at most
// `num_sms` thread blocks, on which no result depends.
void launch_paged(const ProblemOf<DevicePagedSource>& problem, const ActiveRows& rows,
                  std::int32_t unscored, const Scores& scores, const RowLengths& lengths,
                  int num_sms, void* stream);

// The same from the keys' sketches of so many bits, by `operands` in Hopper's order in place of the
// problem's queries.
void launch_paged_sketch(const ProblemOf<DevicePagedSource>& problem, int sketch,
                         const SketchOperands& operands, std::int32_t unscored,
                         const Scores& scores, const RowLengths& lengths, int num_sms,
                         void* stream);

}  // namespace misa::cuda::score
