// SPDX-License-Identifier: Apache-2.0
// The heads of a query and the block means that they meet.
#pragma once

#include <algorithm>
#include <cstdint>
#include <span>

#include "cpu/kernels.hpp"

namespace misa::cpu {

// All heads of one query.
struct Heads {
  const void* rows;       // [H][D] operands
  const float* rows_f32;  // [H][D]; only where block means are met
  const float* weight;    // [H]
  int count;              // H
  Operand operand;
};

// Blocks that a query sees: tiles of the means of whole blocks, and the mean of the block it
// stands in (null if it ends with one).
struct BlockMeans {
  std::span<const Tile> whole;
  std::int64_t whole_count;
  const Tile* partial;
};

// Keys of tile `i` that count, of `total` in tiles of 64.
inline int valid_in_tile(std::size_t i, std::int64_t total) {
  return static_cast<int>(
      std::min<std::int64_t>(kPageSize, total - static_cast<std::int64_t>(i) * kPageSize));
}

}  // namespace misa::cpu
