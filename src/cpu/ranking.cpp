// SPDX-License-Identifier: Apache-2.0
#include "cpu/ranking.hpp"

#include <algorithm>
#include <functional>

#include "core/entry.hpp"

namespace misa::cpu {

RankingScratch take_ranking_scratch(Arena& arena, std::int64_t values) {
  return {arena.take<std::uint64_t>(values), arena.take<std::int32_t>(values)};
}

std::span<const std::int32_t> top_indices(std::span<const float> values, std::int64_t keep,
                                          const RankingScratch& scratch) {
  std::uint64_t* entries = scratch.entries;
  for (std::size_t i = 0; i < values.size(); ++i) {
    entries[i] = make_entry(values[i], static_cast<std::uint32_t>(i));
  }
  std::nth_element(entries, entries + keep, entries + values.size(), std::greater<>());
  for (std::int64_t i = 0; i < keep; ++i) {
    scratch.indices[i] = static_cast<std::int32_t>(entry_position(entries[i]));
  }
  std::sort(scratch.indices, scratch.indices + keep);
  return {scratch.indices, static_cast<std::size_t>(keep)};
}

}  // namespace misa::cpu
