// SPDX-License-Identifier: Apache-2.0
// Sizes of the router's kernels, and their shared memory: the launchers take its size from here.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "device/elements.cuh"
#include "indexers/problem.hpp"
#include "misa/types.hpp"

namespace misa::cuda::route {

inline constexpr int kWarps = 8;
inline constexpr int kThreads = kWarps * 32;
inline constexpr int kBlocksPerSm = 2;

// fp32 queries are three operands where others are one, in registers; one block an SM leaves room.
template <DType type>
inline constexpr int kBlocksPerSmOf = type == DType::f32 ? 1 : kBlocksPerSm;

// Rows of a tile of the matrix product: heads. Columns: keys or block means.
inline constexpr int kTileHeads = 16;
inline constexpr int kTileKeys = 8;

// Steps of the matrix product along D, and how many one load from shared memory serves.
inline constexpr int kStep = 16;
inline constexpr int kStepsPerLoad = 2;

// Judging by means, a warp has two tiles of heads of a query: D / 2 registers of operands a part.
inline constexpr int kTiles = 2;
inline constexpr int kWarpHeads = kTiles * kTileHeads;

// Block means in shared memory at a time, twice for copies run ahead: two blocks an SM of 228 KB,
// and one in the 99 KB that a block may have on the smaller devices.
template <int parts>
inline constexpr int kMeans = parts == 2 ? 64 : 48;

template <int dim, int parts>
struct MeansTile {
  alignas(16) std::uint16_t rows[parts][kMeans<parts>][operand_pitch(dim)];
  float factors[kMeans<parts>];
};

template <int dim, int parts>
struct MeansShared {
  MeansTile<dim, parts> tiles[2];
  float scores[2][kWarps][kMeans<parts>];  // of a tile's blocks by a warp's heads
  float energies[kWarps][kWarpHeads];
  float weights[kWarps][kWarpHeads];
  alignas(16) std::uint16_t own[kWarps][parts][dim];  // the mean of a query's own block
};

static_assert(kBlocksPerSm * (sizeof(MeansShared<128, 3>) + 1024) <= 228 * 1024);
static_assert(kBlocksPerSm * (sizeof(MeansShared<128, 2>) + 1024) <= 228 * 1024);
static_assert(sizeof(MeansShared<128, 3>) <= 99 * 1024);

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
