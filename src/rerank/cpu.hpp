// SPDX-License-Identifier: Apache-2.0
// Re-ranking for the CPU backend.
#pragma once

#include <cstdint>
#include <span>

#include "core/problem.hpp"
#include "cpu/heads.hpp"
#include "cpu/kernels.hpp"
#include "cpu/query.hpp"

namespace misa::cpu {

// Scores the candidates of query t, pairs that ascend by position, by all its heads and offers them
// to the selector.
void rerank(const Kernels& kernels, const Problem& problem, std::int64_t t,
            std::span<const std::uint64_t> candidates, const Heads& heads, Selector& selector,
            ScoreScratch& scratch);

}  // namespace misa::cpu
