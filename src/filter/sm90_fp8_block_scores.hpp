// SPDX-License-Identifier: Apache-2.0
// Scores of block means on Hopper, for e4m3 queries and keys.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/block_means.hpp"
#include "cuda/problem.hpp"

namespace misa::cuda::filter {

// Does what launch_block_scores does, for problems that sm90_can_implement() accepts.
template <class Source>
void launch_block_scores_sm90(const ProblemOf<Source>& problem, const BlockMeanTable& means,
                              float* scores, std::int64_t stride, int num_sms, cudaStream_t stream);

}  // namespace misa::cuda::filter
