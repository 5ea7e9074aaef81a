// SPDX-License-Identifier: Apache-2.0
// The block filter for the CPU backend: which key blocks a query keeps.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/heads.hpp"
#include "cpu/kernels.hpp"

namespace misa::cpu {

// Writes scores[b], over all heads, for every block b that the query sees.
void block_scores(const Kernels& kernels, const Heads& heads, const BlockMeans& means,
                  float* scores);

// Sets the bits of the `count` blocks that are kept, 64 per word: the first, the last, and the best
// of those between. There are more than `count` blocks. `ranking` and `indices` have room for one
// entry per block.
void keep_blocks(std::span<const float> scores, std::int64_t count, std::uint64_t* ranking,
                 std::int32_t* indices, std::span<std::uint64_t> kept);

}  // namespace misa::cpu
