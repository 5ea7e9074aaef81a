// SPDX-License-Identifier: Apache-2.0
// The selector for every CUDA device of compute capability 8.0 and above.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"
#include "misa/cuda.hpp"

namespace misa::cuda::select {

// Takes the arguments of misa::cuda::top_k, already validated, with rows > 0 and an actual row
// stride. Empty rows are written only if `empty` is set, else left as they are. The launch is made
// for `num_sms` SMs; the result does not depend on it.
void launch_generic(const Logits& logits, int top_k, const TopK& out, bool empty, int num_sms,
                    void* stream);

// How many thread blocks share a row of these logits; and the same selection for more than one.
int cluster_size(const Logits& logits, int num_sms);
void launch_cluster(const Logits& logits, int top_k, int size, const TopK& out, bool empty,
                    void* stream);

// The most columns of a row that the registers of a thread block can hold.
inline constexpr std::int64_t kShortColumns = 16384;

// The same for logits of at most kShortColumns columns. If columns.list is set, selected columns
// are written as the positions that they stand for; `keys` then says which keys each row sees.
template <class Source>
void launch_short(const Logits& logits, const Source& keys, const Columns& columns, int top_k,
                  const TopK& out, bool empty, void* stream);

}  // namespace misa::cuda::select
