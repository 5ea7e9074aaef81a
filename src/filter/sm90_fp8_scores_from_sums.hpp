// SPDX-License-Identifier: Apache-2.0
// Scores of block means on Hopper from the sums that a cache keeps, for e4m3 queries.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/problem.hpp"

namespace misa::cuda::filter {

// Does what launch_block_scores does for blocks of `block` keys, for problems that
// sm90_can_implement() accepts and whose cache keeps sums.
void launch_scores_from_sums_sm90(const PagedProblem& problem, std::int32_t block, float* scores,
                                  std::int64_t stride, int num_sms, cudaStream_t stream);

}  // namespace misa::cuda::filter
