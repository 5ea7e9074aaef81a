// SPDX-License-Identifier: Apache-2.0
// A bound that scores exceed strictly, from a sample of them as keys (entry.hpp).
#pragma once

#include <cstdint>
#include <limits>

#include "core/entry.hpp"
#include "select/digits.cuh"

namespace misa::cuda::select {

// The largest float that numbers of this key and above exceed strictly, -inf at least.
__device__ inline float bound_below(std::uint32_t key) {
  constexpr std::uint32_t kLowest = ordered_bits(-std::numeric_limits<float>::infinity());
  constexpr std::uint32_t kZero = ordered_bits(0.0F);
  // Below +0 the next key is -0, which equals it.
  return score_of_bits(max(key, kLowest + 1) - (key == kZero ? 2 : 1));
}

// Where ranks from the top are sought first: the scores down to 1/16 of the largest, or to 16 times
// it if it is negative: four octaves, which a digit of 9 bits tells into 128 parts each.
inline constexpr std::uint32_t kNear = (4U << 23) - 1;

// A bound that the key of rank `wanted` exceeds, and no more than `most` keys if digits can tell
// them apart. A plateau that is wider than `widest` with what lies above it is left out: it could
// not pass whole, and what lies above it may do. `all`: of the keys that are visited
// (digits.cuh).
template <class Radix, class Visit>
__device__ float find_bound(typename Radix::Shared& shared, const Bracket& all,
                            std::uint32_t wanted, std::uint32_t most, std::uint32_t widest,
                            const Visit& visit) {
  Bracket bracket = all;
  if (all.reach > kNear) {
    const std::uint32_t low = all.low + all.reach - kNear;
    bracket = Radix::narrow(shared, {low, kNear, 0, 0}, wanted, visit);
    if (bracket.count == 0) {
      bracket = {all.low, low - 1 - all.low, bracket.above, all.count - bracket.above};
    }
  }
  while (bracket.above + bracket.count > most && bracket.reach != 0) {
    bracket = Radix::narrow(shared, bracket, wanted, visit);
  }
  return bracket.above + bracket.count > widest ? score_of_bits(bracket.low)
                                                : bound_below(bracket.low);
}

}  // namespace misa::cuda::select
