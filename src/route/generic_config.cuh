// Sizes of the router's kernels, and their shared memory: the launchers take its size from here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "device/elements.cuh"
#include "indexers/problem.hpp"
#include "misa/types.hpp"

namespace misa::cuda::route {

// A block serves 8 consecutive queries, which share the keys that it holds: as many as one tile of
// the matrix product has columns, so that the queries' own means are one tile. 2048 queries are 256
// blocks, one wave of two an SM.
inline constexpr int kQueries = 8;
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

// Block means in shared memory at a time: two blocks an SM of 228 KB, and one in the 99 KB that a
// block may have on the smaller devices, with three parts of 2 bytes an element at D = 128.
inline constexpr int kMeans = 96;

template <int dim>
struct MeansShared {
  float values[kQueries][kMaxHeads];  // energies of heads, or scores of the tile's blocks
  alignas(16) std::uint16_t own[kMaxParts][kQueries][operand_pitch(dim)];
  alignas(16) std::uint16_t tile[kMaxParts][kMeans][operand_pitch(dim)];
};

static_assert(kMeans <= kMaxHeads);
static_assert(kBlocksPerSm * (sizeof(MeansShared<128>) + 1024) <= 228 * 1024);
static_assert(sizeof(MeansShared<128>) <= 99 * 1024);

// The fixed part of what sampled routing holds; the sampled keys follow it, part by part.
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
