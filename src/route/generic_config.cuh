// SPDX-License-Identifier: Apache-2.0
// Sizes of the sampled router's kernels, and their shared memory: the launchers take its size from
// here.
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

// fp32 queries are three operands where others are one, in registers; one block an SM leaves room.
template <DType type>
inline constexpr int kBlocksPerSmOf = type == DType::f32 ? 1 : kBlocksPerSm;

// A block serves up to 16 consecutive queries, fewer where there are not enough for the blocks that
// the device holds at a time. 2048 queries are one wave on 132 SMs.
inline constexpr int kQueries = 16;

constexpr int queries_of_block(std::int64_t tokens, std::int64_t blocks) {
  return static_cast<int>(std::clamp<std::int64_t>((tokens + blocks - 1) / blocks, 1, kQueries));
}

// Sampled routing: the fixed part of what it holds; the sampled keys follow it, part by part.
struct SampleShared {
  float value[kQueries][kMaxHeads];        // what a head is worth
  float coefficient[kQueries][kMaxHeads];  // w_j p_j
  float scale[kMaxSamples];                // of the sampled keys
  float squares[kMaxSamples];              // the sum of squares of a sampled key
  std::uint32_t active[kQueries][kMaxHeads / 32];
};

template <int dim>
using SampleRow = std::uint16_t[operand_pitch(dim)];

template <int dim>
constexpr std::size_t sample_bytes(int key_parts) {
  return sizeof(SampleShared) +
         static_cast<std::size_t>(key_parts) * kMaxSamples * sizeof(SampleRow<dim>);
}

static_assert(sizeof(SampleShared) % 16 == 0);

}  // namespace misa::cuda::route
