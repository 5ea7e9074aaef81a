// SPDX-License-Identifier: Apache-2.0
// The pooled router on Hopper, for e4m3 queries and keys.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/block_means.hpp"
#include "cuda/problem.hpp"

namespace misa::cuda::route {

// Does what launch_pooled does, for problems that sm90_can_implement() accepts. `num_sms`: the
// number of SMs of the device.
template <class Source>
void launch_pooled_sm90(const ProblemOf<Source>& problem, const BlockMeanTable& means,
                        std::int32_t count, std::int32_t* heads, int num_sms, cudaStream_t stream);

}  // namespace misa::cuda::route
