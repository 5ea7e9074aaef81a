// SPDX-License-Identifier: Apache-2.0
// Heads and blocks judged by block means.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/problem.hpp"
#include "cuda/target.hpp"
#include "pool/generic.hpp"

namespace misa::cuda::route {

// The pooled router: heads [T, count] of the largest energy, ascending; -1 for empty rows.
void launch_pooled(const Problem& problem, const Device& device, const pool::Means& means,
                   std::int32_t count, std::int32_t* heads, cudaStream_t stream);

// scores[t, b] of every whole block b that query t sees, over all heads.
void launch_block_scores(const Problem& problem, const Device& device, const pool::Means& means,
                         float* scores, std::int64_t stride, cudaStream_t stream);

}  // namespace misa::cuda::route
