// SPDX-License-Identifier: Apache-2.0
// The pooled router: chooses heads by their energies over block means.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "cuda/block_means.hpp"
#include "cuda/problem.hpp"
#include "cuda/target.hpp"

namespace misa::cuda::route {

// Writes the heads [T, count] of largest energy, ascending; -1 for queries that see no keys.
template <class Source>
void launch_pooled(const ProblemOf<Source>& problem, const DeviceTraits& device,
                   const BlockMeanTable& means, std::int32_t count, std::int32_t* heads,
                   cudaStream_t stream);

}  // namespace misa::cuda::route
