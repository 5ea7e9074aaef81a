// SPDX-License-Identifier: Apache-2.0
// Ranking of few values, such as heads and blocks, and positions with their scores.
#pragma once

#include <cstdint>
#include <span>

namespace misa::cpu {

// The indices of the `keep` largest values, ascending: ties to the lower index, NaN below every
// number. `scratch` holds one entry a value.
void top_indices(std::span<const float> values, std::int64_t keep, std::uint64_t* scratch,
                 std::int32_t* out);

// The position of a (position, score bits) pair.
constexpr std::uint32_t pair_position(std::uint64_t pair) {
  return static_cast<std::uint32_t>(pair >> 32);
}

}  // namespace misa::cpu
