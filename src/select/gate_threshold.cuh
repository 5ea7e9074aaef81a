// SPDX-License-Identifier: Apache-2.0
// A threshold that scores exceed strictly, from a sample of them as keys (entry.hpp).
#pragma once

#include <cstdint>
#include <limits>

#include "core/entry.hpp"
#include "select/radix_histogram.cuh"

namespace misa::cuda::select {

// The largest float that numbers of this key and above exceed strictly, -inf at least.
__device__ inline float threshold_below(std::uint32_t key) {
  constexpr std::uint32_t kLowest = ordered_bits(-std::numeric_limits<float>::infinity());
  constexpr std::uint32_t kZero = ordered_bits(0.0F);
  // Below +0 the next key is -0, which equals it.
  return score_of_bits(max(key, kLowest + 1) - (key == kZero ? 2 : 1));
}

// Where ranks from the top are sought first: the scores down to 1/16 of the largest, or to 16 times
// it if it is negative: four octaves, which a digit of 9 bits tells into 128 parts each.
inline constexpr std::uint32_t kNear = (4U << 23) - 1;

// A threshold that the key of rank `wanted` exceeds, and no more than `most` keys if digits can
// tell them apart. A plateau that is wider than `widest` with what lies above it is left out: it
// could not pass whole, and what lies above it may do. `all`: of the keys that are visited
// (digits.cuh).
template <class Radix, class Visit>
__device__ float find_gate_threshold(typename Radix::Shared& shared, const Bucket& all,
                                     std::uint32_t wanted, std::uint32_t most, std::uint32_t widest,
                                     const Visit& visit) {
  Bucket bucket = all;
  if (all.reach > kNear) {
    const std::uint32_t low = all.low + all.reach - kNear;
    bucket = Radix::narrow(shared, {low, kNear, 0, 0}, wanted, visit);
    if (bucket.count == 0) {
      bucket = {all.low, low - 1 - all.low, bucket.above, all.count - bucket.above};
    }
  }
  while (bucket.above + bucket.count > most && bucket.reach != 0) {
    bucket = Radix::narrow(shared, bucket, wanted, visit);
  }
  return bucket.above + bucket.count > widest ? score_of_bits(bucket.low)
                                              : threshold_below(bucket.low);
}

}  // namespace misa::cuda::select
