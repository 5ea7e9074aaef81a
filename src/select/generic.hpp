// SPDX-License-Identifier: Apache-2.0
// The selector for every CUDA device of compute capability 8.0 and above.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"
#include "misa/cuda.hpp"

namespace misa::cuda::select {

// Arguments as misa::cuda::top_k has them, valid, with rows > 0 and the row stride filled in.
// Empty rows are written only if `empty` says so, else they are left as they are.
void launch_generic(const Logits& logits, int top_k, const TopK& out, bool empty, void* stream);

// Columns of a row that a block's registers hold.
inline constexpr std::int64_t kShortColumns = 16384;

// The same for logits of no more columns than that. With a list, which says what columns of the
// keys' queries they are, the selected are written as the positions that they stand for.
void launch_short(const Logits& logits, const Keys& keys, const Columns& columns, int top_k,
                  const TopK& out, bool empty, void* stream);

}  // namespace misa::cuda::select
