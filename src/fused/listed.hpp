// SPDX-License-Identifier: Apache-2.0
// Scores of listed keys (candidates, or the keys of kept blocks) for Hopper, with the bits that the
// fused kernels give them (fused/sm90.hpp), for the same tensors.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"
#include "fused/sm90.hpp"

namespace misa::cuda::fused {

// Writes scores[t, c] for the columns c below lengths[t], which stand for positions that query t
// sees, and nothing else. Queries that see no more than `unscored` keys are passed over. `columns`
// has a list; `scales`: of all keys (launch_scales); `processors`: of the device.
void launch_listed(const Problem& problem, const Rows& rows, const cuda::Columns& columns,
                   const std::int32_t* lengths, std::int32_t unscored, const float* scales,
                   const Scores& scores, int processors, void* stream);

}  // namespace misa::cuda::fused
