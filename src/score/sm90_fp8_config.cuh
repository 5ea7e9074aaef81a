// SPDX-License-Identifier: Apache-2.0
// Sizes common to the e4m3 scoring kernels for Hopper, and the shared memory of gathered scoring.
#pragma once

#include <cstdint>

#include "cuda/sm90.hpp"

namespace misa::cuda::score {

inline constexpr int kProductKeys = 64;      // keys of a product: M of the MMA
inline constexpr int kProductColumns = 128;  // query rows of a product, at most: N of the MMA
inline constexpr int kWarpgroupThreads = 128;

// Columns of a product that one thread accumulates: each lane of a quad has a quarter of them.
inline constexpr int kThreadColumns = kProductColumns / 4;

// The weights of a product's columns in shared memory: those of one lane of a quad are contiguous,
// and the four lanes start four banks apart.
inline constexpr int kLaneWeights = kThreadColumns + 4;
inline constexpr int kProductWeights = 4 * kLaneWeights;

// --- Gathered scoring (sm90_fp8_gathered.cu) ---

inline constexpr int kGatheredProducts = 2;
inline constexpr int kGatheredTile = kGatheredProducts * kProductKeys;

// Two stages: one tile is scored while the next is copied. Registers allow four thread blocks per
// SM: while one waits for its tile, others compute.
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
