// SPDX-License-Identifier: Apache-2.0
// Blocks judged by their means.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/block_means.hpp"
#include "cuda/problem.hpp"
#include "cuda/target.hpp"

namespace misa::cuda::filter {

// scores[t, b] of every whole block b that query t sees, over all heads.
void launch_block_scores(const Problem& problem, const DeviceTraits& device, const BlockMeans& means,
                         float* scores, std::int64_t stride, cudaStream_t stream);

}  // namespace misa::cuda::filter
