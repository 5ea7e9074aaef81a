// Sizes of the fused scoring kernels and their shared memory: the launchers take them from here.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/problem.hpp"

namespace misa::cuda::fused {

inline constexpr int kDim = 128;      // D, so that a row is the 128 bytes of one swizzle
inline constexpr int kProductKeys = 64;  // keys of a product: wgmma's M
inline constexpr int kTileKeys = 2 * kProductKeys;  // keys that are fetched and awaited together
inline constexpr int kTileBytes = kTileKeys * kDim;
inline constexpr int kColumns = 256;  // rows of queries of a product: wgmma's largest N
inline constexpr int kHalfColumns = kColumns / 2;
inline constexpr int kRowBytes = kColumns * kDim;

// Two warpgroups score, each for its own queries: one weighs its sums while the tensor cores work
// for the other. A third one feeds them.
inline constexpr int kGroups = 2;
inline constexpr int kGroupThreads = 128;
inline constexpr int kThreads = (kGroups + 1) * kGroupThreads;

// A group holds 128 sums, 64 weights and up to 16 bounds and cursors a thread; 240 x 256 + 24 x 128
// is what an SM has.
inline constexpr int kScoringRegisters = 240;
inline constexpr int kFeedingRegisters = 24;

// Key tiles in flight: 3 of 16 KB cover the latency of L2 (about 700 cycles) at one tile in 2048.
inline constexpr int kStages = 4;

inline constexpr int kScaleThreads = 256;

// A queued entry's position holds a key's index in its lower bits and the number of the thread's
// query, at most 15, above.
inline constexpr int kKeyBits = 28;
inline constexpr std::int64_t kMaxKeys = std::int64_t{1} << kKeyBits;

// Every tile takes kPops entries out of each queue while the tensor cores work, about what it adds
// where 1 score in 16 passes, and goes on while one of a warp's queues holds more than kQueueSpare.
inline constexpr int kPops = 2;
inline constexpr int kQueueSpare = 8;
inline constexpr int kQueueStep = kGroups * kGroupThreads;  // from one entry to the next

// Which row stands in a column of a product: thread `lane` of a quad holds the columns
// 8 j + 2 lane + e of a key, local number 2 j + e. Local numbers are the rows of one query, then of
// the next, so that a thread has all rows of a query and sums them alone.
template <int rows>
struct Columns {
  static constexpr int kQueries = kColumns / rows;  // of a group
  static constexpr int kOwn = kQueries / 4;         // of a thread
  static constexpr int kBlockQueries = kGroups * kQueries;
  static_assert(kColumns % (4 * rows) == 0);
};

struct Shared {
  alignas(1024) std::uint8_t keys[kStages][kTileBytes];
  alignas(1024) std::uint8_t rows[kGroups][kRowBytes];
  float weights[kGroups][kColumns];
  std::int32_t starts[kGroups * kColumns / 4];  // of each query's keys; a query has 4 rows or more
  std::int32_t ends[kGroups * kColumns / 4];
  std::int32_t first;  // of the keys that some query of the block sees
  std::int32_t last;   // one behind them
  std::int32_t plain_first[kGroups];  // of the tiles that every query of a group sees in full
  std::int32_t plain_last[kGroups];
  alignas(8) std::uint64_t full[kStages];
  std::uint64_t empty[kStages];
  alignas(16) std::uint32_t counts[kGroups * kColumns / 4];  // of each query's candidates
};
static_assert(sizeof(Shared) % alignof(Candidate) == 0);

// The queues, [depth, threads that score], follow.

template <int rows>
constexpr int shared_bytes() {
  constexpr int kDepth = kQueueSpare + 2 * Columns<rows>::kOwn;
  constexpr int kBytes = static_cast<int>(sizeof(Shared)) +
                         kDepth * kGroups * kGroupThreads * static_cast<int>(sizeof(Candidate));
  static_assert(kBytes <= 227 * 1024);
  return kBytes;
}

// --- Queries that the bound misled (sm90_missed.cu) ---

// A block takes four at once, one for each lane of a quad; each of its warpgroups scores tiles of
// its own.
inline constexpr int kMissedQueries = 4;
inline constexpr int kMissedThreads = 512;  // as many as select a row (select/row.cuh)
inline constexpr int kMissedGroups = kMissedThreads / kGroupThreads;

struct MissedShared {
  alignas(1024) std::uint8_t keys[kMissedGroups][kProductKeys * kDim];
  alignas(1024) std::uint8_t rows[kRowBytes];
  float weights[kColumns];
  std::int64_t queries[kMissedQueries];  // -1: none
  std::int32_t starts[kMissedQueries];
  std::int32_t lengths[kMissedQueries];
};

}  // namespace misa::cuda::fused
