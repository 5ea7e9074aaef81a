// SPDX-License-Identifier: Apache-2.0
// Ranking of a few values, such as one per head or per block; and (position, score bits) pairs.
#pragma once

#include <cstdint>
#include <span>

#include "core/arena.hpp"

namespace misa::cpu {

struct RankingScratch {
  std::uint64_t* entries;  // one per value
  std::int32_t* indices;   // one per value
};

RankingScratch take_ranking_scratch(Arena& arena, std::int64_t values);

// The indices of the `keep` largest values, ascending: ties to the lower index, NaN below every
// number. They lie in the scratch.
std::span<const std::int32_t> top_indices(std::span<const float> values, std::int64_t keep,
                                          const RankingScratch& scratch);

// The position of a (position, score bits) pair.
constexpr std::uint32_t pair_position(std::uint64_t pair) {
  return static_cast<std::uint32_t>(pair >> 32);
}

}  // namespace misa::cpu
