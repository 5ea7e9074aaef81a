// Sizes of the selection kernels, and their shared memory: launchers take it from here too.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cub/block/block_scan.cuh>

#include "misa/cuda.hpp"

namespace misa::cuda::select {

// A block selects a row. 512 threads: a few blocks share an SM, so that while one sorts out its
// candidates the others keep the memory busy.
inline constexpr int kThreads = 512;
inline constexpr int kWarps = kThreads / 32;

// Radix digits: 2048 counters are zeroed and scanned four a thread.
inline constexpr int kDigitBits = 11;
inline constexpr int kBins = 1 << kDigitBits;
inline constexpr int kBinsPerThread = kBins / kThreads;

// So few entries are ranked directly. One digit of a few thousand scores in a narrow range leaves
// 5 to 70.
inline constexpr int kFew = 128;

// Positions that one pass of the output covers: a bitmap in the histogram's place. Offsets into it
// fit 16 bits.
inline constexpr int kWindow = kBins * 32;

using Scan = cub::BlockScan<std::uint32_t, kThreads, cub::BLOCK_SCAN_WARP_SCANS>;

// A bin of a histogram: how many keys lie in bins above, and how many in it.
struct Bin {
  std::uint32_t digit;
  std::uint32_t above;
  std::uint32_t count;
};

// A candidate (cuda/problem.hpp) as shared memory holds it: moved as one word of 8 bytes.
struct alignas(8) Held {
  float score;
  std::uint32_t position;
};

// The fixed part; Held held[capacity] and uint16 staged[top_k] follow it.
struct Shared {
  std::uint32_t words[kBins];  // a histogram, then a bitmap
  std::uint64_t few[kFew];
  std::uint64_t cut;
  std::uint16_t starts[kThreads];  // rank of the first position of each thread's words
  std::uint32_t few_count;
  std::uint32_t smallest;
  std::uint32_t largest;
  std::uint32_t appended;  // candidates, also those beyond the capacity
  std::uint32_t equals;    // scores equal to the bound
  Bin bin;
  Scan::TempStorage scan;
};

// What a block's shared memory is laid out for.
struct Plan {
  std::uint32_t top_k;
  std::uint32_t capacity;  // candidates held

  __host__ __device__ std::size_t bytes() const {
    return sizeof(Shared) + capacity * sizeof(Held) + top_k * sizeof(std::uint16_t);
  }
};

// As many candidates as wanted, or as fit where a block may have `limit` bytes.
inline Plan plan_within(int top_k, int wanted, std::size_t limit) {
  const auto k = static_cast<std::uint32_t>(top_k);
  const std::size_t most = (limit - Plan{k, 0}.bytes()) / sizeof(Held);
  return {k, static_cast<std::uint32_t>(std::min<std::size_t>(wanted, most))};
}

// --- Rows of scores (row.cuh, short.cu) ---

// How many scores a row has, whatever device memory says.
__device__ inline std::uint32_t row_length(const Logits& logits, std::int64_t row) {
  std::int64_t length = logits.columns;
  if (logits.lengths != nullptr) {
    length = max(std::int64_t{0}, min(length, std::int64_t{logits.lengths[row]}));
  }
  return static_cast<std::uint32_t>(length);
}

// Three blocks an SM where k <= 2048: at most 42 registers a thread.
inline constexpr int kRowBlocksPerSm = 3;

// 16-byte loads in flight a thread: with 1536 threads 98 KB an SM, three times what latency (0.8
// us) x bandwidth (32 bytes a ns and SM on an H200) asks for, so one block in three may do other
// work.
inline constexpr int kLoads = 4;

// Sampled scores, in segments of 32 bytes (one sector of DRAM traffic). With 4096 of 256K positions
// and k = 2048 the bound sits at rank 62 of the sample, which holds 32 +- 6 of the top k: five
// standard deviations; at 64K it is nearly twelve.
inline constexpr int kSampleVectors = 2;  // of 4 scores, a thread
inline constexpr int kSample = kThreads * kSampleVectors * 4;
inline constexpr int kSegments = kSample / 8;

struct RowPlan : Plan {
  std::uint32_t target;  // how many scores the bound should let through
};

// 7680 candidates are as many as let three blocks share an SM; the bound wants room between k and
// the capacity, so a larger k has as many more than k. A capacity below k is no error: such rows
// are selected from global memory. The target is halfway as ratios go: equally far, in standard
// deviations of the sample, from letting through too few and too many.
inline constexpr int kRowRoom = 7680;
inline RowPlan plan_row(int top_k, std::size_t limit) {
  const Plan plan = plan_within(top_k, top_k <= 2048 ? kRowRoom : top_k + kRowRoom, limit);
  return {plan, static_cast<std::uint32_t>(std::sqrt(static_cast<double>(plan.top_k) *
                                                     static_cast<double>(plan.capacity)))};
}

// An SM has 228 KB, of which each block costs 1 KB.
constexpr bool fit_an_sm(int blocks, std::size_t candidates) {
  return blocks * (sizeof(Shared) + candidates * sizeof(Held) + 2048 * 2 + 1024) <= 228 * 1024;
}
static_assert(fit_an_sm(kRowBlocksPerSm, kRowRoom));
static_assert(kBins == 4 * kThreads);  // each thread reads its words as one uint4
static_assert(sizeof(Shared) % sizeof(Held) == 0);

}  // namespace misa::cuda::select
