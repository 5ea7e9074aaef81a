// SPDX-License-Identifier: Apache-2.0
// Sizes and shared memory of the routing kernels.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/recipe.hpp"
#include "cuda/elements.cuh"
#include "misa/types.hpp"

namespace misa::cuda::route {

inline constexpr int kWarps = 8;
inline constexpr int kThreads = kWarps * 32;
inline constexpr int kBlocksPerSm = 2;

// fp32 queries take three times the registers of others, so an SM has one thread block of them.
template <DType type>
inline constexpr int kBlocksPerSmOf = type == DType::f32 ? 1 : kBlocksPerSm;

// Consecutive queries that a thread block routes at most: 2048 queries then are one wave on 132
// SMs.
inline constexpr int kThreadBlockQueries = 16;

// Queries per thread block: fewer if there are too few for all `thread_blocks` that the device runs
// at a time.
constexpr int thread_block_queries(std::int64_t tokens, std::int64_t thread_blocks) {
  return static_cast<int>(std::clamp<std::int64_t>((tokens + thread_blocks - 1) / thread_blocks, 1,
                                                   kThreadBlockQueries));
}

// Shared memory of sampled routing, except the sampled keys, which follow it, part by part, in
// sampled_kernel.
struct SampledShared {
  float value[kThreadBlockQueries][kMaxHeads];        // by which heads are chosen
  float coefficient[kThreadBlockQueries][kMaxHeads];  // w_j p_j
  float scale[kMaxSamples];                           // of a sampled key
  float squares[kMaxSamples];                         // sum of squares of a sampled key
  std::uint32_t active[kThreadBlockQueries][kMaxHeads / 32];
};

template <int dim>
using SampleRow = std::uint16_t[operand_pitch(dim)];

template <int dim>
constexpr std::size_t sample_bytes(int key_parts) {
  return sizeof(SampledShared) +
         static_cast<std::size_t>(key_parts) * kMaxSamples * sizeof(SampleRow<dim>);
}

static_assert(sizeof(SampledShared) % 16 == 0);

}  // namespace misa::cuda::route
