// SPDX-License-Identifier: Apache-2.0
// A block-mean table that is filled with the caller's means.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/arena.hpp"
#include "cuda/block_means.hpp"
#include "cuda/problem.hpp"
#include "misa/view.hpp"

namespace misa::cuda::pool {

// The kernels compute a query's blocks from the keys that it sees. Here these keys do not exist and
// are never read: they count as two for every whole block, and one for a partial block.
inline constexpr std::int32_t kGivenBlock = 2;

struct GivenTable {
  BlockMeanTable means;
  std::int32_t* starts;  // [T] ks in terms of these keys
  std::int32_t* ends;    // [T] ke

  [[nodiscard]] DeviceRaggedSource keys() const;
};

// Takes memory from the arena for a table of `count` means of `dim` elements and `tokens` queries.
GivenTable take_given_table(std::int64_t tokens, std::int64_t count, std::int64_t dim,
                            Arena& arena);

// Fills such a table. Block ranges are clamped to the means; a query whose partial block's row is
// out of range has no partial block.
void launch_given(const RaggedMeans& means, std::int64_t tokens, const GivenTable& table,
                  cudaStream_t stream);

}  // namespace misa::cuda::pool
