// SPDX-License-Identifier: Apache-2.0
// The block filter for the CPU backend: which blocks of its keys a query keeps.
#pragma once

#include <cstdint>
#include <span>

#include "core/arena.hpp"
#include "cpu/heads.hpp"
#include "cpu/kernels.hpp"
#include "cpu/ranking.hpp"

namespace misa::cpu {

struct FilterScratch {
  float* scores;  // one per block
  RankingScratch ranking;
};

FilterScratch take_filter_scratch(Arena& arena, std::int64_t blocks);

// Sets the bits of the `count` blocks that are kept, 64 bits per word, and clears the others. Kept
// are the first block, the last, and those of the others whose means have the best scores over all
// heads. There must be more than `count` blocks.
void keep_blocks(const Kernels& kernels, const Heads& heads, const BlockMeans& means,
                 std::int64_t count, const FilterScratch& scratch,
                 std::span<std::uint64_t> kept_blocks);

}  // namespace misa::cpu
