// SPDX-License-Identifier: Apache-2.0
// Sizes of the kernels that select from rows of scores, and their shared memory, for kernels and
// launchers alike.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>

#include "misa/cuda.hpp"
#include "select/radix_histogram.cuh"

namespace misa::cuda::select {

// A thread block selects a row. With 512 threads two thread blocks share an SM, so that one keeps
// the memory busy while the other sorts its candidates.
inline constexpr int kThreads = 512;

// 2048 buckets, four per thread.
using Radix = RadixHistogram<kThreads, 11>;

// At most this many entries are ranked directly, by comparing all pairs. One radix pass over a few
// thousand scores in a narrow range leaves 5 to 70.
inline constexpr int kMaxRanked = 128;

// How many positions the output's bitmap covers. The bitmap shares the histogram's memory. Offsets
// into it fit 16 bits.
inline constexpr int kWindow = Radix::kBuckets * 32;

// A score above the gate threshold and its position in the row; moved as one word of 8 bytes.
struct alignas(8) RowCandidate {
  float score;
  std::uint32_t position;
};

// The fixed part; RowCandidate candidates[capacity] and uint16 staged[top_k] follow it.
struct Shared {
  Radix::Shared radix;  // its histogram's memory is also the bitmap
  std::uint64_t ranked[kMaxRanked];
  std::uint64_t kth_entry;
  std::uint16_t ranks[Radix::kBuckets];  // of the first position of each word of the bitmap
  std::uint32_t ranked_count;
  std::uint32_t appended;  // candidates, including those beyond the capacity
};

// How many scores a row has, clamped to what is safe whatever device memory holds.
__device__ inline std::uint32_t row_length(const Logits& logits, std::int64_t row) {
  std::int64_t length = logits.columns;
  if (logits.lengths != nullptr) {
    length = max(std::int64_t{0}, min(length, std::int64_t{logits.lengths[row]}));
  }
  return static_cast<std::uint32_t>(length);
}

// With two thread blocks per SM, a thread may have 64 registers; with three it has 40, which leaves
// no room to load ahead.
inline constexpr int kRowBlocksPerSm = 2;

// 16-byte loads that a thread has in flight while it examines as many. With 1024 threads per SM
// that is 64 KB, more than twice the product of latency (0.8 us) and bandwidth (32 bytes per ns and
// SM on an H200), so one of the two thread blocks may do other work.
inline constexpr int kLoads = 4;

// Sampled scores, in segments of 32 bytes (one sector of DRAM traffic). With 4096 of 256K positions
// and k = 2048 the threshold has rank 62 in the sample, which holds 32 +- 6 of the top k: a margin
// of five standard deviations; at 64K it is nearly twelve.
inline constexpr int kSampleVectors = 2;  // of 4 scores, per thread
template <int vectors>
inline constexpr int kSampled = kThreads* vectors * 4;
inline constexpr int kSample = kSampled<kSampleVectors>;

// Of 1M positions that sample would mislead for one row in a hundred, which then takes 2 ms on an
// H200. Rows from 256K on have a larger one.
inline constexpr std::uint32_t kLeastManySamples = 1U << 18;
inline constexpr int kManySampleVectors = 8;

// The sizes that determine the layout of a thread block's shared memory.
struct RowPlan {
  std::uint32_t top_k;
  std::uint32_t capacity;  // candidates that fit
  std::uint32_t target;    // how many scores the threshold should let through

  __host__ __device__ std::size_t bytes() const {
    return sizeof(Shared) + capacity * sizeof(RowCandidate) + top_k * sizeof(std::uint16_t);
  }
};

// The capacity exceeds k by a margin within which the number of candidates may vary. It is 7680 for
// k up to 2048, else k + 7680, but at most what fits `limit` bytes of shared memory. A capacity
// below k is valid: rows are then selected from global memory. The target is the geometric mean of
// k and the capacity: equally far, in standard deviations of the sample, from too few and too many
// candidates.
inline constexpr int kRowCandidates = 7680;
inline RowPlan plan_row(int top_k, std::size_t limit) {
  const auto k = static_cast<std::uint32_t>(top_k);
  const std::size_t most = (limit - RowPlan{k, 0, 0}.bytes()) / sizeof(RowCandidate);
  const auto capacity = static_cast<std::uint32_t>(
      std::min<std::size_t>(top_k <= 2048 ? kRowCandidates : top_k + kRowCandidates, most));
  return {k, capacity,
          static_cast<std::uint32_t>(
              std::sqrt(static_cast<double>(k) * static_cast<double>(capacity)))};
}

// Whether `blocks` thread blocks fit the 228 KB of shared memory of an SM; each takes 1 KB more
// than it requests.
constexpr bool fit_an_sm(int blocks, std::size_t candidates) {
  return blocks * (sizeof(Shared) + candidates * sizeof(RowCandidate) + 2048 * 2 + 1024) <=
         228 * 1024;
}
static_assert(fit_an_sm(kRowBlocksPerSm, kRowCandidates));
static_assert(Radix::kBuckets == 4 * kThreads);  // each thread reads its words as one uint4
static_assert(sizeof(Shared) % sizeof(RowCandidate) == 0);

}  // namespace misa::cuda::select
