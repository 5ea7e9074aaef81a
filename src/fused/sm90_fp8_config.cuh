// SPDX-License-Identifier: Apache-2.0
// Sizes and shared memory of the fused scoring kernels.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/problem.hpp"
#include "fused/work_plan.hpp"
#include "score/sm90_fp8.hpp"
#include "score/sm90_fp8_config.cuh"

namespace misa::cuda::fused {

using score::kProductColumns;
using score::kProductKeys;
using score::kProductWeights;
using score::kThreadColumns;
using score::kWarpgroupThreads;

// Four warpgroups score different queries, each with one product at a time: while one warpgroup
// runs its epilogue, the products of the others keep the tensor cores busy (docs/kernels/fused.md).
// 16 warps can have 128 registers per thread: 64 accumulators, and the weights of 32 columns. A
// 17th warp as the producer would leave them 96, so a thread of the first warpgroup is the
// producer.
inline constexpr int kWarpgroups = 4;
inline constexpr int kThreads = kWarpgroups * kWarpgroupThreads;

// Keys of a tile, which are fetched and awaited together. Larger tiles spread the cost of a
// pipeline stage over more products. Samples are few, and thread blocks score whole tiles, so their
// tiles are smaller.
inline constexpr int kTileKeys = 256;
inline constexpr int kSampleTileKeys = 128;

// Two stages: while one tile is scored, the next is fetched. The producer does this after three
// quarters of its warpgroup's products with a tile. The last quarter, 64 keys in 1600 cycles,
// covers the latency of L2 (about 700), and the other warpgroups may lag by up to three quarters.
inline constexpr int kStages = 2;

// Whether a thread block may score splits of several query blocks (KeySplits). With 4 rows per
// query, which have the most thresholds per thread, and with 64, which take two products, there are
// not enough registers for it.
constexpr bool may_span_query_blocks(int rows) { return rows > 4 && rows < 64; }

static_assert(kTileKeys == score::kScaleTile, "scales are padded to whole tiles");

// A queued entry has its key's index in the lower bits of a word, and above it the number of the
// thread's query, at most 15.
inline constexpr int kKeyBits = 28;
inline constexpr std::int64_t kMaxKeys = std::int64_t{1} << kKeyBits;

// While a product runs, each thread of a warp pops one entry at a time from its queue, as long as
// some queue of the warp holds more than this many. By then most of the other queues have entries
// too, so few lanes are idle. This is the largest number for which shared memory has room.
constexpr int queue_spare(int rows) { return rows < 64 ? 7 : 4; }
inline constexpr std::uint32_t kQueueStride = kThreads * sizeof(Candidate);  // to the next entry

// Query rows of a warpgroup: at least one query for each lane of a quad.
constexpr int warpgroup_columns(int rows) { return rows < 32 ? kProductColumns : 4 * rows; }

// The query rows of a warpgroup, one per column of its products, for `rows` rows per query.
// score/sm90_fp8_rows.cuh says which row is in which column.
template <int rows>
struct QueryTile {
  static constexpr int kColumns = warpgroup_columns(rows);
  static constexpr int kProducts = kColumns / kProductColumns;  // for all columns of a key
  static constexpr int kQueries = kColumns / rows;
  static constexpr int kThreadQueries = kQueries / 4;
  static constexpr int kBlockQueries = kWarpgroups * kQueries;  // of a query block
  static_assert(kColumns % kProductColumns == 0 && kColumns % (4 * rows) == 0);
};

// Tiles first … end - 1.
struct alignas(8) TileRange {
  std::int32_t first;
  std::int32_t end;
};

template <int rows>
struct Shared {
  alignas(1024) std::uint8_t keys[kStages][kTileKeys * kDim];
  alignas(1024) std::uint8_t query_rows[kWarpgroups][QueryTile<rows>::kColumns * kDim];
  alignas(16) float weights[kWarpgroups][QueryTile<rows>::kProducts][kProductWeights];
  std::int32_t starts[QueryTile<rows>::kBlockQueries];  // of each query's keys
  std::int32_t ends[QueryTile<rows>::kBlockQueries];
  std::uint32_t counts[QueryTile<rows>::kBlockQueries];  // of each query's candidates
  std::int32_t first_key;                                // that some query of the query block sees
  std::int32_t end_key;                                  // after the last such key
  TileRange fully_visible[kWarpgroups];  // tiles that all queries of a warpgroup see in full
  alignas(8) std::uint64_t full[kStages];
  std::uint64_t empty[kStages];
  Candidate queue[queue_spare(rows) + 2 * QueryTile<rows>::kThreadQueries][kThreads];
};
static_assert(sizeof(Shared<4>) <= 227 * 1024 && sizeof(Shared<64>) <= 227 * 1024);

// --- Fallback rows (sm90_fp8_fallback.cu) ---

// A thread block scores four queries at once, one for each lane of a quad. Its warpgroups score
// different key tiles.
inline constexpr int kFallbackQueries = 4;
inline constexpr int kFallbackThreads = 512;  // as many as select a row (select/row.cuh)
inline constexpr int kFallbackWarpgroups = kFallbackThreads / kWarpgroupThreads;

struct FallbackShared {
  alignas(1024) std::uint8_t keys[kFallbackWarpgroups][kProductKeys * kDim];
  alignas(1024) std::uint8_t rows[kFallbackQueries * kMaxRows * kDim];
  alignas(16) float weights[kFallbackQueries * kMaxRows / kProductColumns][kProductWeights];
  std::int64_t queries[kFallbackQueries];  // -1: none
  std::int32_t starts[kFallbackQueries];
  std::int32_t lengths[kFallbackQueries];
};

}  // namespace misa::cuda::fused
