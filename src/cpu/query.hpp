// SPDX-License-Identifier: Apache-2.0
// One query between the stages: what each stage leaves for the next.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/recipe.hpp"
#include "cpu/kernels.hpp"

namespace misa::cpu {

// Memory for the rows of one query (QueryRows).
struct RowBuffers {
  std::byte* data;  // operands
  float* weight;
  float* floor;
};

struct Query {
  std::int64_t t;
  std::int64_t n;  // keys that it sees
  Recipe recipe;
  bool scored;  // false: all keys that it sees are selected
  RowBuffers row_buffers;
  QueryRows rows;                        // that give the first scores
  std::span<std::uint64_t> kept_blocks;  // a bit per block, where recipe.filtered
  std::span<Selector> selectors;         // of the first selection, one per key split
};

// Scratch memory for scoring keys and offering the scores to a selector.
struct ScoreScratch {
  Tile tile;               // operands
  void* pack;              // [64][D] operands
  std::uint64_t* entries;  // [capacity of the selector]
  std::uint16_t* sketch;   // [64][D] bf16 elements of the keys' sketches; null without one
};

}  // namespace misa::cpu
