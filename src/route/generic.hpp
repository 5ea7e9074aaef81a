// SPDX-License-Identifier: Apache-2.0
// Routing for every CUDA device of compute capability 8.0 and above.
#pragma once

#include <cuda_runtime_api.h>

#include "cuda/block_means.hpp"
#include "cuda/problem.hpp"
#include "cuda/target.hpp"
#include "misa/indexer.hpp"

namespace misa::cuda::route {

// Writes `out`: the active heads of every query, and its residual row if the configuration has one.
// The router is any but `all`. `means`: for the router `pooled` the table of blocks of
// `config.block` keys, with partial block means; else null.
template <class Source>
void launch(const ProblemOf<Source>& problem, const IndexerConfig& config,
            const DeviceTraits& device, const BlockMeanTable* means, const Routing& out,
            cudaStream_t stream);

}  // namespace misa::cuda::route
