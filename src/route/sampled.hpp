// SPDX-License-Identifier: Apache-2.0
// Heads judged by sampled keys or by themselves, and the row that stands for the others.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/problem.hpp"
#include "cuda/target.hpp"
#include "misa/indexer.hpp"

namespace misa::cuda::route {

// Every router but `all` and, where `out` holds the heads already, `pooled`; the residual row with
// any.
void launch_sampled(const Problem& problem, const IndexerConfig& config, const DeviceTraits& device,
                    const Routing& out, cudaStream_t stream);

}  // namespace misa::cuda::route
