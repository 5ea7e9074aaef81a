// SPDX-License-Identifier: Apache-2.0
// The block filter for the CPU backend: which blocks of its keys a query keeps.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/heads.hpp"
#include "cpu/kernels.hpp"

namespace misa::cpu {

// scores[blocks]: the score over all heads of each block mean.
void block_scores(const Kernels& kernels, const Heads& heads, const BlockMeans& means,
                  float* scores);

// Sets the bits of the blocks that are kept, 64 a word: the first, the last, and of those between
// the best, `count` in all. There are more blocks than that. `ranking` and `indices` hold an entry
// a block.
void keep_blocks(std::span<const float> scores, std::int64_t count, std::uint64_t* ranking,
                 std::int32_t* indices, std::span<std::uint64_t> kept);

}  // namespace misa::cpu
