// SPDX-License-Identifier: Apache-2.0
// The block filter for every CUDA device of compute capability 8.0 and above.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/block_means.hpp"
#include "cuda/problem.hpp"
#include "cuda/target.hpp"
#include "misa/indexer.hpp"

namespace misa::cuda::filter {

// Bytes of workspace for a call with up to `shape.tokens` queries.
std::size_t workspace_bytes(const IndexerConfig& config, const Shape& shape);

// Whether `launch` reads rows of the block-mean table.
template <class Source>
bool reads_means(const ProblemOf<Source>& problem, const DeviceTraits& device);

// Writes the blocks that each query keeps, [T, filter_blocks]: ascending, then -1. `means` is the
// table of blocks of `config.filter_block` keys; it has no rows if they are not read.
template <class Source>
void launch(const ProblemOf<Source>& problem, const IndexerConfig& config,
            const DeviceTraits& device, const BlockMeanTable& means, std::int32_t* blocks,
            std::span<std::byte> workspace, cudaStream_t stream);

}  // namespace misa::cuda::filter
