// SPDX-License-Identifier: Apache-2.0
// Routing and the block filter from given block means, all of it in device memory.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/target.hpp"
#include "misa/view.hpp"

namespace misa::cuda {

// Bytes of workspace that a call of `tokens` queries on `count` means takes.
std::size_t means_bytes(std::int64_t tokens, std::int64_t dim, std::int64_t count);

// A validated call on block means, with actual strides instead of default ones.
struct MeansCall {
  Queries q;
  Weights w;
  RaggedMeans means;
  DeviceTraits device;
  std::byte* workspace;  // aligned to 256 bytes
  void* stream;
};

// Writes the heads that the pooled router chooses, [T, heads].
void route_from_means(const MeansCall& call, int heads, std::int32_t* out);

// Writes the blocks that the block filter keeps, [T, filter_blocks].
void keep_blocks_from_means(const MeansCall& call, int filter_blocks, std::int32_t* out);

}  // namespace misa::cuda
