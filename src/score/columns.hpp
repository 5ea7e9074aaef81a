// SPDX-License-Identifier: Apache-2.0
// The columns of a matrix of scores (cuda::Columns): how many of them a query's row has, and which
// positions the selected ones stand for.
#pragma once

#include "cuda/problem.hpp"

namespace misa::cuda::score {

// Where it is written how long the rows of scores are, [T] each or null.
struct RowLengths {
  std::int32_t* all;         // how many columns stand for positions that query t sees
  std::int32_t* candidates;  // the same, at most `keep`
  std::int32_t keep;
};

// Writes them.
template <class Source>
void launch_row_lengths(const Source& keys, std::int64_t queries, const Columns& columns,
                        const RowLengths& lengths, void* stream);

// Replaces the columns in selected [T, width], padded with -1, by their positions. Its rows are
// `stride` elements apart. Positions ascend with columns, so ordered entries stay ordered.
template <class Source>
void launch_positions(const Source& keys, std::int64_t queries, const Columns& columns,
                      std::int32_t* selected, std::int32_t width, std::int64_t stride,
                      void* stream);

}  // namespace misa::cuda::score
