// SPDX-License-Identifier: Apache-2.0
// Sizes of the selection kernels, and their shared memory: launchers take it from here too.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "misa/cuda.hpp"
#include "select/radix_histogram.cuh"

namespace misa::cuda::select {

// A block selects a row. 512 threads: two blocks share an SM, so that while one sorts out its
// candidates the other keeps the memory busy.
inline constexpr int kThreads = 512;

// 2048 bins, four a thread.
using Radix = RadixHistogram<kThreads, 11>;

// So few entries are ranked directly. One digit of a few thousand scores in a narrow range leaves
// 5 to 70.
inline constexpr int kFew = 128;

// Positions that one pass of the output covers: a bitmap in the histogram's place. Offsets into it
// fit 16 bits.
inline constexpr int kWindow = Radix::kBuckets * 32;

// A candidate (cuda/problem.hpp) as shared memory holds it: moved as one word of 8 bytes.
struct alignas(8) Held {
  float score;
  std::uint32_t position;
};

// The fixed part; Held held[capacity] and uint16 staged[top_k] follow it.
struct Shared {
  Radix::Shared radix;  // its histogram is a bitmap too
  std::uint64_t few[kFew];
  std::uint64_t cut;
  std::uint16_t ranks[Radix::kBuckets];  // of each word's first position
  std::uint32_t few_count;
  std::uint32_t appended;  // candidates, also those beyond the capacity
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

// Two blocks an SM, at most 64 registers a thread: three, of 40, leave no room for loads ahead.
inline constexpr int kRowBlocksPerSm = 2;

// 16-byte loads of a thread that are under way while as many are looked at: with 1024 threads 64 KB
// an SM, twice what latency (0.8 us) x bandwidth (32 bytes a ns and SM on an H200) asks for, so one
// block in two may do other work.
inline constexpr int kLoads = 4;

// Sampled scores, in segments of 32 bytes (one sector of DRAM traffic). With 4096 of 256K positions
// and k = 2048 the threshold sits at rank 62 of the sample, which holds 32 +- 6 of the top k: five
// standard deviations; at 64K it is nearly twelve.
inline constexpr int kSampleVectors = 2;  // of 4 scores, a thread
inline constexpr int kSample = kThreads * kSampleVectors * 4;
inline constexpr int kSegments = kSample / 8;

struct RowPlan : Plan {
  std::uint32_t target;  // how many scores the threshold should let through
};

// The threshold wants room between k and the capacity: 7680 candidates, and for a larger k as many
// more than k. A capacity below k is no error: such rows are selected from global memory. The
// target is halfway as ratios go: equally far, in standard deviations of the sample, from letting
// through too few and too many.
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
static_assert(Radix::kBuckets == 4 * kThreads);  // each thread reads its words as one uint4
static_assert(sizeof(Shared) % sizeof(Held) == 0);

}  // namespace misa::cuda::select
