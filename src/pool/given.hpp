// SPDX-License-Identifier: Apache-2.0
// A block-mean table of means that the caller gives.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

#include "core/arena.hpp"
#include "cuda/block_means.hpp"
#include "cuda/problem.hpp"
#include "misa/view.hpp"

namespace misa::cuda::pool {

// The means stand for keys that are never read: two of every whole block, and one of a partial
// block. So a query that sees those keys sees its blocks.
inline constexpr std::int32_t kGivenBlock = 2;

struct GivenTable {
  BlockMeanTable means;
  std::int32_t* starts;  // [T] ks of the keys
  std::int32_t* ends;    // [T] ke

  [[nodiscard]] DeviceRaggedSource keys() const;
};

// Takes the table of `count` means of `dim` elements for `tokens` queries.
GivenTable take_given_table(std::int64_t tokens, std::int64_t count, std::int64_t dim,
                            Arena& arena);

// Fills such a table. Rows out of range are clamped, and a partial block's is none then.
void launch_given(const RaggedMeans& means, std::int64_t tokens, const GivenTable& table,
                  cudaStream_t stream);

}  // namespace misa::cuda::pool
