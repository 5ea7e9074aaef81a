// SPDX-License-Identifier: Apache-2.0
// Between two selections: how long the rows of scores are, and which positions their columns are.
#pragma once

#include "cuda/problem.hpp"

namespace misa::cuda::rerank {

// lengths[t]: how many columns stand for positions that query t sees, at most `most`.
void launch_lengths(const Keys& keys, std::int64_t queries, const Columns& columns,
                    std::int32_t most, std::int32_t* lengths, void* stream);

// Turns chosen[T, width], columns with -1 behind them, into positions. Columns ascend as positions
// do, so what was ordered stays so.
void launch_positions(const Keys& keys, std::int64_t queries, const Columns& columns,
                      std::int32_t* chosen, std::int32_t width, void* stream);

}  // namespace misa::cuda::rerank
