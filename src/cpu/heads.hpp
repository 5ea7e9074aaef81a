// SPDX-License-Identifier: Apache-2.0
// The heads of a query and the block means that they score.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <span>

#include "cpu/kernels.hpp"

namespace misa::cpu {

// All heads of one query.
struct Heads {
  const std::byte* rows;  // [H][D] operands
  const float* rows_f32;  // [H][D]; null where no block means are scored
  const float* weight;    // [H]
  int count;              // H
  int dim;                // D
  Operand operand;

  [[nodiscard]] std::int64_t row_bytes() const {
    return dim * static_cast<std::int64_t>(size_of(operand));
  }
};

// QueryRows::floor of heads, which all clip at 0.
inline constexpr float kReluFloors[kMaxHeads] = {};

// 0, 1, 2, …
inline constexpr auto kEveryHead = [] {
  std::array<std::int32_t, kMaxHeads> heads{};
  for (int j = 0; j < kMaxHeads; ++j) {
    heads[static_cast<std::size_t>(j)] = j;
  }
  return heads;
}();

// All heads as the rows that score keys, or block means.
inline QueryRows rows_for_keys(const Heads& heads) {
  return {heads.rows, heads.weight, kReluFloors, heads.count};
}
inline QueryRows rows_for_means(const Heads& heads) {
  return {heads.rows_f32, heads.weight, kReluFloors, heads.count};
}

// The means of the blocks that a query sees, in f32.
struct BlockMeans {
  std::span<const Tile> whole;  // means of the blocks that it sees in full
  std::int64_t whole_count;
  const Tile* partial;  // mean of the keys that it sees of its partial block; null if it has none
};

// How many keys tile `i` holds of `total` in tiles of 64.
inline int valid_in_tile(std::size_t i, std::int64_t total) {
  return static_cast<int>(
      std::min<std::int64_t>(kPageSize, total - static_cast<std::int64_t>(i) * kPageSize));
}

}  // namespace misa::cpu
