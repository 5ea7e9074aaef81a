// SPDX-License-Identifier: Apache-2.0
// Sizes and shared memory of paged scoring.
#pragma once

#include <cstdint>

#include "score/sm90_fp8_config.cuh"

namespace misa::cuda::score {

// A tile is the keys of one product, 64 positions: a page of 64, half a page of 128, or two pages
// of 32.
inline constexpr int kPagedTile = kProductKeys;
inline constexpr int kMaxTileParts = 2;  // pages that a tile lies in

// Four warpgroups score a tile each, a round of tiles together, so that the products of one run
// during the epilogues of the others. One more warp, the producer, fetches tiles.
inline constexpr int kPagedWarpgroups = 4;
inline constexpr int kConsumers = kPagedWarpgroups * kWarpgroupThreads;
inline constexpr int kPagedThreads = kConsumers + 32;

// Tiles in flight. Memory answers after about 1 us, in which an SM receives 30 KB, four tiles. More
// stages also cover the time in which the rows of new queries are loaded.
inline constexpr int kPagedStages = 16;
static_assert(kPagedStages % kPagedWarpgroups == 0, "a stage always has the same warpgroup");

// The columns of a product are slices of 64. A slice has the rows of one query, 16 in each lane of
// a quad; or, if queries have at most 16 rows, those of four queries, one in each lane.
inline constexpr int kSliceColumns = kMaxRows;
inline constexpr int kSliceLaneColumns = kSliceColumns / 4;
inline constexpr int kMaxPackedRows = kSliceLaneColumns;

// The weights of a slice: those of a lane are contiguous, and the four lanes start in different
// banks.
inline constexpr int kSliceLaneWeights = kSliceLaneColumns + 4;

// What a stage holds.
struct alignas(16) TileInfo {
  std::int32_t query;      // the first one of the tile's query group; -1 after the last group
  std::int32_t tile;       // its number in the sequence; -1 if the stage is empty
  std::int32_t bad_parts;  // bit i: part i of the tile is in a page that does not exist
};

template <int slices, int queries>
struct PagedShared {
  alignas(1024) std::uint8_t keys[kPagedStages][kPagedTile * kDim];
  alignas(1024) std::uint8_t rows[slices * kSliceColumns * kDim];
  alignas(128) float scales[kPagedStages][kPagedTile];
  alignas(16) float weights[slices][4 * kSliceLaneWeights];
  TileInfo info[kPagedStages];
  alignas(8) std::uint64_t full[kPagedStages];
  std::uint64_t empty[kPagedStages];
  std::int32_t lengths[queries];  // of the rows of the current group's queries
  // The work of the thread block (find_work).
  std::int64_t warp_sums[(kPagedThreads + 31) / 32];
  std::int64_t first_tiles;
  std::int32_t first_query;
};
static_assert(sizeof(PagedShared<4, 4>) <= 227 * 1024);

}  // namespace misa::cuda::score
