// SPDX-License-Identifier: Apache-2.0
// Selection where scoring is fused with it: a threshold from a sample before scoring, the exact top
// k of what passed it after.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"
#include "misa/cuda.hpp"

namespace misa::cuda::select {

// Scores of sampled keys; a row's samples are its columns that are not NaN.
struct Samples {
  const float* scores;   // [T, columns]
  std::int64_t columns;  // at most kMaxSamples
  std::int64_t stride;   // elements from one row to the next
};

inline constexpr std::int64_t kMaxSamples = 4096;

// Lists of a query: one for every lane of a warp.
inline constexpr std::uint32_t kMaxLists = 32;

// Rows that the survivors could not decide, in any order; what selects them must write their
// outputs whole.
struct FallbackRows {
  std::int32_t* rows;  // [T]
  std::uint32_t* count;
  std::uint32_t* parts;  // [T], for whoever shares out the work on them
};

// thresholds [T]: more than top_k of a row's scores, and not many more, should exceed its threshold
// strictly. -inf where a row has no more than top_k keys or too few samples to say. Zeroes
// *fallback.count for the launch_survivors that follows, and fallback.parts. rows > 0; `keys` says
// which each row sees.
void launch_threshold(const Samples& samples, const Keys& keys, std::int64_t rows, int top_k,
                      float* thresholds, const FallbackRows& fallback, void* stream);

// Writes `out` as misa::cuda::top_k does from each row's candidates: all of its scores above some
// threshold, in lists in any order. A row of no more than top_k keys is written without them,
// unless scores are wanted; one of no keys only if `empty` says so, else it is left as it is. Rows
// that lost candidates, or have fewer than min(top_k, keys), are appended to the fallback instead.
// rows > 0, lists <= kMaxLists, lists * capacity < 2^32.
void launch_survivors(const Candidates& candidates, const Keys& keys, std::int64_t rows, int top_k,
                      const TopK& out, bool empty, const FallbackRows& fallback, void* stream);

}  // namespace misa::cuda::select
