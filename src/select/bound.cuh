// A bound that scores exceed strictly, from the key (entry.hpp) of the last one that should.
#pragma once

#include <cstdint>
#include <limits>

#include "select/entry.hpp"

namespace misa::cuda::select {

// The largest float that numbers of this key and above exceed strictly, -inf at least.
__device__ inline float bound_below(std::uint32_t key) {
  constexpr std::uint32_t kLowest = ordered_bits(-std::numeric_limits<float>::infinity());
  constexpr std::uint32_t kZero = ordered_bits(0.0F);
  // Below +0 the next key is -0, which equals it.
  return score_of_bits(max(key, kLowest + 1) - (key == kZero ? 2 : 1));
}

}  // namespace misa::cuda::select
