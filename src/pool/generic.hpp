// SPDX-License-Identifier: Apache-2.0
// Block means for every CUDA device of compute capability 8.0 and above.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/block_means.hpp"
#include "cuda/problem.hpp"
#include "misa/indexer.hpp"

namespace misa::cuda::pool {

// Enough for sequences that do not overlap and hold `total_keys` keys. With less, or with overlap,
// results stay and time grows. `own` says that queries' own means are wanted.
std::size_t workspace_bytes(const Shape& shape, std::int64_t total_keys, std::int32_t block,
                            bool own);

// BlockMeans all whole blocks that a query of `problem` sees, and the queries' own ones.
BlockMeans launch(const Problem& problem, std::int32_t block, bool own,
                  std::span<std::byte> workspace, cudaStream_t stream);

}  // namespace misa::cuda::pool
