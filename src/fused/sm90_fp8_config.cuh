// SPDX-License-Identifier: Apache-2.0
// Sizes of the fused scoring kernels and their shared memory: the launchers take them from here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/problem.hpp"
#include "fused/work_plan.hpp"
#include "score/sm90_fp8.hpp"
#include "score/sm90_fp8_config.cuh"

namespace misa::cuda::fused {

using score::kGroupThreads;
using score::kProductColumns;
using score::kProductKeys;
using score::kProductLocals;
using score::kProductWeights;

// Four warpgroups score, each for its own queries and one product at a time: while a group weighs,
// the products of others keep the tensor cores busy (docs/kernels/fused.md). 16 warps may have 128
// registers a thread: 64 sums, and the weights of 32 columns. A 17th warp to feed the others would
// cost them 32, so a thread of the first group does it.
inline constexpr int kGroups = 4;
inline constexpr int kThreads = kGroups * kGroupThreads;

// A tile: keys that are fetched and awaited together. What a tile costs besides its products is
// less with more of them; but samples are few, and blocks share them out in whole tiles.
inline constexpr int kTileKeys = 256;
inline constexpr int kSampleTileKeys = 128;

// Tiles in shared memory: one that is scored, and the next one, fetched when three quarters of the
// groups' products with this one are done. The last quarter, 64 keys in 1600 cycles, covers the
// latency of L2 (about 700); groups may lag behind the first one by what comes before.
inline constexpr int kStages = 2;

// Whether a thread block may have parts of several blocks of queries (Deal). Registers do not do
// with 4 rows, which have the most thresholds, and with 64, whose products are two.
constexpr bool takes_pieces(int rows) { return rows > 4 && rows < 64; }

static_assert(kTileKeys == score::kScaleTile, "there are scales for whole tiles");

// A queued entry's key has its index in its lower bits and the number of the thread's query, at
// most 15, above.
inline constexpr int kKeyBits = 28;
inline constexpr std::int64_t kMaxKeys = std::int64_t{1} << kKeyBits;

// While its product is computed a warp takes entries out of its queues, one of each, as long as one
// of them holds more than this: all the others have some too, then, mostly. As many as there is
// room for.
constexpr int queue_spare(int rows) { return rows < 64 ? 7 : 4; }
inline constexpr std::uint32_t kQueueStep = kThreads * sizeof(Candidate);  // to the next entry

// ProductColumns of a group whose queries have this many rows: a query stands in each lane of a
// quad.
constexpr int group_columns(int rows) { return rows < 32 ? kProductColumns : 4 * rows; }

// Which row stands in a column of a product: thread `lane` of a quad holds the columns
// 8 j + 2 lane + e of a key, local number 2 j + e. Local numbers are the rows of one query, then of
// the next, so that a thread has all rows of a query and sums them alone.
template <int rows>
struct ProductColumns {
  static constexpr int kCount = group_columns(rows);
  static constexpr int kProducts = kCount / kProductColumns;  // for all of a key's columns
  static constexpr int kQueries = kCount / rows;              // of a group
  static constexpr int kOwn = kQueries / 4;                   // of a thread
  static constexpr int kBlockQueries = kGroups * kQueries;
  static_assert(kCount % kProductColumns == 0 && kCount % (4 * rows) == 0);
};

// Tiles from the first one to before the last.
struct alignas(8) TileRange {
  std::int32_t first;
  std::int32_t last;
};

template <int rows>
struct Shared {
  using Own = ProductColumns<rows>;

  alignas(1024) std::uint8_t keys[kStages][kTileKeys * kDim];
  alignas(1024) std::uint8_t rows_of[kGroups][Own::kCount * kDim];
  alignas(16) float weights[kGroups][Own::kProducts][kProductWeights];
  std::int32_t starts[Own::kBlockQueries];  // of each query's keys
  std::int32_t ends[Own::kBlockQueries];
  std::uint32_t counts[Own::kBlockQueries];  // of each query's candidates
  std::int32_t first;                        // of the keys that some query of the block sees
  std::int32_t last;                         // one behind them
  TileRange plain[kGroups];                  // that every query of a group sees in full
  alignas(8) std::uint64_t full[kStages];
  std::uint64_t empty[kStages];
  Candidate queue[queue_spare(rows) + 2 * Own::kOwn][kThreads];
};
static_assert(sizeof(Shared<4>) <= 227 * 1024 && sizeof(Shared<64>) <= 227 * 1024);

// --- Queries that the threshold misled (sm90_fp8_fallback.cu) ---

// A block takes four at once, one for each lane of a quad; each of its warpgroups scores tiles of
// its own.
inline constexpr int kFallbackQueries = 4;
inline constexpr int kFallbackThreads = 512;  // as many as select a row (select/row.cuh)
inline constexpr int kFallbackGroups = kFallbackThreads / kGroupThreads;

struct FallbackShared {
  alignas(1024) std::uint8_t keys[kFallbackGroups][kProductKeys * kDim];
  alignas(1024) std::uint8_t rows[kFallbackQueries * kMaxRows * kDim];
  alignas(16) float weights[kFallbackQueries * kMaxRows / kProductColumns][kProductWeights];
  std::int64_t queries[kFallbackQueries];  // -1: none
  std::int32_t starts[kFallbackQueries];
  std::int32_t lengths[kFallbackQueries];
};

}  // namespace misa::cuda::fused
