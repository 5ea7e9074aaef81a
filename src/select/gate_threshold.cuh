// SPDX-License-Identifier: Apache-2.0
// A gate threshold, which scores must exceed strictly, from a sample of the scores. Here, keys are
// ordered_bits of scores (entry.hpp).
#pragma once

#include <cstdint>
#include <limits>

#include "core/entry.hpp"
#include "select/radix_histogram.cuh"

namespace misa::cuda::select {

// The largest float that scores of this key and above exceed strictly, but at least -inf.
__device__ inline float threshold_below(std::uint32_t key) {
  constexpr std::uint32_t kLowest = ordered_bits(-std::numeric_limits<float>::infinity());
  constexpr std::uint32_t kZero = ordered_bits(0.0F);
  // The key below +0 is that of -0, which equals +0.
  return score_of_bits(max(key, kLowest + 1) - (key == kZero ? 2 : 1));
}

// The first pass covers the four octaves below the largest key (down to 1/16 of a positive score),
// which hold nearly every threshold; 9 bits divide each octave into 128 buckets.
inline constexpr std::uint32_t kTopOctaves = (4U << 23) - 1;

// A threshold that the key of rank `rank` exceeds, and that at most `max_passing` keys exceed
// unless scores are tied. If more than `max_tied` keys would pass because of ties, the threshold is
// the tied score itself: the tied keys, which would not all fit, fail, and the larger ones may
// suffice. `all`: RadixHistogram::initial_bucket of the visited keys.
template <class Radix, class Visit>
__device__ float find_gate_threshold(typename Radix::Shared& shared, const Bucket& all,
                                     std::uint32_t rank, std::uint32_t max_passing,
                                     std::uint32_t max_tied, const Visit& visit) {
  Bucket bucket = all;
  if (all.range > kTopOctaves) {
    const std::uint32_t low = all.low + all.range - kTopOctaves;
    bucket = Radix::choose_bucket(shared, {low, kTopOctaves, 0, 0}, rank, visit);
    if (bucket.count == 0) {  // the rank is lower: search the rest
      bucket = {all.low, low - 1 - all.low, bucket.above, all.count - bucket.above};
    }
  }
  while (bucket.above + bucket.count > max_passing && bucket.range != 0) {
    bucket = Radix::choose_bucket(shared, bucket, rank, visit);
  }
  return bucket.above + bucket.count > max_tied ? score_of_bits(bucket.low)
                                                : threshold_below(bucket.low);
}

}  // namespace misa::cuda::select
