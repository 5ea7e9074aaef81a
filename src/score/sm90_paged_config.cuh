// SPDX-License-Identifier: Apache-2.0
// Sizes and shared memory of paged scoring.
#pragma once

#include <cstdint>

#include "score/sm90_fp8_config.cuh"

namespace misa::cuda::score {

// A tile is 64 or 128 positions, in blocks of 64, the keys of a product. The pages it lies in have
// 32, 64 or 128 tokens.
inline constexpr int kMaxTileParts = 4;

// Four warpgroups score a tile each, a round of tiles together, so that the products of one run
// during the epilogues of the others. Each has a producer, a warp that fetches its tiles: one warp
// takes some 0.25 us to start the copies of a tile.
inline constexpr int kPagedWarpgroups = 4;
inline constexpr int kConsumers = kPagedWarpgroups * kWarpgroupThreads;
inline constexpr int kProducers = kPagedWarpgroups * 32;
inline constexpr int kPagedThreads = kConsumers + kProducers;

// A thread of 640 starts with 96 registers. Producers need fewer, which consumers get.
inline constexpr int kProducerRegisters = 56;
inline constexpr int kConsumerRegisters = 104;
static_assert(kProducers * kProducerRegisters + kConsumers * kConsumerRegisters <=
              kPagedThreads * 96);

// The columns of a product are slices. A slice has the rows of one query, a quarter of them in each
// lane of a quad; or, if queries have few rows, those of four queries, one in each lane. The
// weights of a slice: those of a lane are contiguous, and the four lanes start in different banks.
constexpr int slice_weights(int lane_columns) { return 4 * (lane_columns + 4); }

// What a stage holds.
struct alignas(16) TileInfo {
  std::int32_t query;      // the first one of the tile's query group; -1 after the last group
  std::int32_t tile;       // its number in the sequence; -1 if the stage is empty
  std::int32_t bad_parts;  // bit i: part i of the tile is in a page that does not exist
};

// Tiles first to end - 1 of the group of query `query`, which a thread block scores one after the
// other.
struct Run {
  std::int32_t query;  // -1: no further tiles
  std::int32_t sequence;
  std::int32_t keys;  // of the group's longest row
  std::int32_t first;
  std::int32_t end;
};

// The shared memory of a thread block. `Keys` is a tile's format (score/sm90_paged.cuh), and each
// slice has four times lane_columns columns.
template <class Keys, int slices, int lane_columns, int queries>
struct PagedShared {
  alignas(1024) std::uint8_t tiles[Keys::stages][Keys::tile_bytes];
  alignas(1024) std::uint8_t rows[slices * 4 * lane_columns * kDim];
  alignas(16) float weights[slices][slice_weights(lane_columns)];
  TileInfo info[Keys::stages];
  alignas(8) std::uint64_t full[Keys::stages];
  std::uint64_t empty[Keys::stages];
  Run runs[2];                    // the current one and the one after it
  std::int32_t lengths[queries];  // of the rows of the current group's queries
  typename Keys::Constants constants;
  // The work of the thread block (find_work).
  std::int64_t warp_sums[kPagedThreads / 32];
  std::int64_t first_tiles;
  std::int32_t first_query;

  static_assert(Keys::stages % kPagedWarpgroups == 0, "a stage always has the same warpgroup");
};

}  // namespace misa::cuda::score
