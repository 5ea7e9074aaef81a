// SPDX-License-Identifier: Apache-2.0
// Scores of block means on Hopper.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/block_means.hpp"
#include "cuda/problem.hpp"

namespace misa::cuda::filter {

// scores[t, b] of every whole block b that query t sees, over all heads, for what
// sm90_can_implement.
void launch_block_scores_sm90(const Problem& problem, const BlockMeans& means, float* scores,
                              std::int64_t stride, cudaStream_t stream);

}  // namespace misa::cuda::filter
