// SPDX-License-Identifier: Apache-2.0
// Re-ranking for the CPU backend.
#pragma once

#include <cstdint>
#include <span>

#include "core/problem.hpp"
#include "cpu/kernels.hpp"

namespace misa::cpu {

// Scores the candidates of query t, pairs in ascending order of position, with all heads and offers
// them to the selector. `pack` has room for the operands of 64 keys, `entries` for
// selector.capacity entries.
void rerank(const Kernels& kernels, const Problem& problem, std::int64_t t,
            std::span<const std::uint64_t> candidates, const QueryRows& all_heads, Operand operand,
            void* pack, Tile& tile, Selector& selector, std::uint64_t* entries);

}  // namespace misa::cpu
