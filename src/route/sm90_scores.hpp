// SPDX-License-Identifier: Apache-2.0
// Scores of block means on Hopper.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/problem.hpp"
#include "cuda/target.hpp"
#include "pool/generic.hpp"

namespace misa::cuda::route {

// Whether the device and the problem are those that the kernels of sm90* are for.
bool takes_sm90(const Problem& problem, const Device& device);

// As launch_block_scores.
void launch_block_scores_sm90(const Problem& problem, const pool::Means& means, float* scores,
                              std::int64_t stride, cudaStream_t stream);

}  // namespace misa::cuda::route
