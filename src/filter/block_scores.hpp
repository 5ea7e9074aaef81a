// SPDX-License-Identifier: Apache-2.0
// Scores of block means, for the block filter.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/block_means.hpp"
#include "cuda/problem.hpp"
#include "cuda/target.hpp"

namespace misa::cuda::filter {

// Whether block scores come from the sums that the cache keeps, without a block-mean table.
template <class Source>
bool scores_from_sums(const ProblemOf<Source>& problem, const DeviceTraits& device);

// Writes scores[t, b], over all heads, for every whole block b that query t sees.
template <class Source>
void launch_block_scores(const ProblemOf<Source>& problem, const DeviceTraits& device,
                         const BlockMeanTable& means, float* scores, std::int64_t stride,
                         cudaStream_t stream);

}  // namespace misa::cuda::filter
