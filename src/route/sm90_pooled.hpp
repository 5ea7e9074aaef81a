// SPDX-License-Identifier: Apache-2.0
// The pooled router on Hopper.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/problem.hpp"
#include "pool/generic.hpp"

namespace misa::cuda::route {

// As launch_pooled, for what takes_sm90; `processors`: of the device.
void launch_pooled_sm90(const Problem& problem, const pool::Means& means, std::int32_t count,
                        std::int32_t* heads, int processors, cudaStream_t stream);

}  // namespace misa::cuda::route
