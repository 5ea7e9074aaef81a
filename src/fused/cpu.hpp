// SPDX-License-Identifier: Apache-2.0
// Scoring with the first selection, for the CPU backend: only the scores of one page are in memory
// at a time.
#pragma once

#include <cstdint>
#include <span>

#include "core/problem.hpp"
#include "cpu/kernels.hpp"
#include "cpu/query.hpp"

namespace misa::cpu {

// One of `count` splits of a sequence's pages.
struct KeySplit {
  std::int64_t index;
  std::int64_t count;
};

// For queries of one sequence: loads each page of the split once, scores it by every query that
// sees it, and offers the scores to the query's selector of this split.
void score_pages(const Kernels& kernels, const Problem& problem, std::span<const Query> queries,
                 KeySplit split, Operand operand, ScoreScratch& scratch);

}  // namespace misa::cpu
