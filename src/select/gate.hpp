// SPDX-License-Identifier: Apache-2.0
// Selection around scoring with a gate: a gate threshold for each row before scoring, from a sample
// of its scores; the exact top k of the candidates, the scores above it, after.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"
#include "misa/cuda.hpp"

namespace misa::cuda::select {

// Scores of sampled keys; a row's samples are its columns that are not NaN.
struct Samples {
  const float* scores;   // [T, columns]
  std::int64_t columns;  // at most kMaxGateSamples
  std::int64_t stride;   // elements from one row to the next
};

inline constexpr std::int64_t kMaxGateSamples = 4096;

// The most lists of candidates that a query may have: each lane of a warp reads one.
inline constexpr std::uint32_t kMaxLists = 32;

// Rows whose candidates did not suffice for the top k, in any order. launch_survivors does not
// write the outputs of these rows, so the kernel that selects them must write their whole outputs.
struct FallbackRows {
  std::int32_t* rows;  // [T]
  std::uint32_t* count;
  std::uint32_t* finished_splits;  // [T] finished key splits of each group of fallback rows
};

// thresholds [T]: more than top_k of a row's scores, but not many more, should strictly exceed the
// row's threshold. -inf where a row has no more than top_k keys, or too few samples. Zeroes
// *fallback.count and fallback.finished_splits for the kernels that follow. rows > 0; `keys` says
// which keys each row sees.
void launch_threshold(const Samples& samples, const DeviceRaggedSource& keys, std::int64_t rows,
                      int top_k, float* thresholds, const FallbackRows& fallback, void* stream);

// Writes `out` as misa::cuda::top_k does, from each row's candidates: all of its scores above some
// threshold, in lists in any order. Without out.scores, a row of no more than top_k keys needs no
// candidates. A row of no keys is written only if `empty` is set, else left as it is. Rows whose
// lists overflowed, or that have fewer than min(top_k, keys) candidates, are not written but
// appended to the fallback. rows > 0, lists <= kMaxLists, lists * capacity < 2^32.
void launch_survivors(const Candidates& candidates, const DeviceRaggedSource& keys,
                      std::int64_t rows, int top_k, const TopK& out, bool empty,
                      const FallbackRows& fallback, void* stream);

}  // namespace misa::cuda::select
