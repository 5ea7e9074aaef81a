// SPDX-License-Identifier: Apache-2.0
// Routers that choose heads by sampled keys or without keys, and the residual row.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/problem.hpp"
#include "cuda/target.hpp"
#include "misa/indexer.hpp"

namespace misa::cuda::route {

// Writes the heads of every query, for any router but `all`, and the residual row if the
// configuration has one. For the router `pooled`, `out` holds the heads already.
template <class Source>
void launch_sampled(const ProblemOf<Source>& problem, const IndexerConfig& config,
                    const DeviceTraits& device, const Routing& out, cudaStream_t stream);

}  // namespace misa::cuda::route
