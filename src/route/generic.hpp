// SPDX-License-Identifier: Apache-2.0
// Routing and the block filter for every CUDA device of compute capability 8.0 and above.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/problem.hpp"
#include "cuda/target.hpp"
#include "misa/indexer.hpp"

namespace misa::cuda::route {

// For slabs of `shape.tokens` queries over keys of `total_keys` tokens. Less memory than this for
// the pool's tables costs time, never the result.
std::size_t workspace_bytes(const IndexerConfig& config, const Shape& shape,
                            std::int64_t total_keys);

// Fills `out`: the active heads of every query, and its residual row if the configuration has one.
// The router is any but `all`.
void launch(const Problem& problem, const IndexerConfig& config, const Device& device,
            const Routing& out, std::span<std::byte> workspace, cudaStream_t stream);

}  // namespace misa::cuda::route

namespace misa::cuda::filter {

std::size_t workspace_bytes(const IndexerConfig& config, const Shape& shape,
                            std::int64_t total_keys);

// Writes the kept blocks of every query, [T, filter_blocks] ascending, -1 on the right.
void launch(const Problem& problem, const IndexerConfig& config, const Device& device,
            std::int32_t* blocks, std::span<std::byte> workspace, cudaStream_t stream);

}  // namespace misa::cuda::filter
