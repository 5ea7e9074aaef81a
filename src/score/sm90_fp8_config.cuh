// SPDX-License-Identifier: Apache-2.0
// Sizes that all e4m3 scoring kernels for Hopper share, and the shared memory of gathered scoring.
#pragma once

#include <cstdint>

#include "cuda/sm90.hpp"

namespace misa::cuda::score {

inline constexpr int kProductKeys = 64;      // keys of a product: wgmma's M
inline constexpr int kProductColumns = 128;  // rows of queries of a product, at most: wgmma's N
inline constexpr int kGroupThreads = 128;    // a warpgroup

// Product columns whose sums one thread holds: each lane of a quad has a quarter.
inline constexpr int kProductLocals = kProductColumns / 4;

// The weights of a product's columns, as threads read them: a quad's lane has its own together, and
// lanes start four banks apart.
inline constexpr int kLaneWeights = kProductLocals + 4;
inline constexpr int kProductWeights = 4 * kLaneWeights;

// --- Gathered scoring (sm90_fp8_gathered.cu) ---

inline constexpr int kGatheredProducts = 2;
inline constexpr int kGatheredTile = kGatheredProducts * kProductKeys;

// A tile that is scored, and the next one. Four thread blocks an SM are what registers have room
// for: while one waits for its tile, others add.
inline constexpr int kGatheredStages = 2;
inline constexpr int kGatheredBlocks = 4;

struct GatheredShared {
  alignas(1024) std::uint8_t keys[kGatheredStages][kGatheredTile * kDim];
  alignas(1024) std::uint8_t rows[kMaxRows * kDim];
  float scales[kGatheredStages][kGatheredTile];
  std::uint32_t positions[kGatheredStages][kGatheredTile];
  float weights[kMaxRows];
};
static_assert(kGatheredBlocks * (sizeof(GatheredShared) + 1024) <= 227 * 1024);

}  // namespace misa::cuda::score
