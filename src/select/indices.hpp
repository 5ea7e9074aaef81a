// SPDX-License-Identifier: Apache-2.0
// What a caller may want in place of positions: slots of the paged cache, or positions with an
// offset.
#pragma once

#include <cstdint>

#include "misa/indexer.hpp"

namespace misa::cuda::select {

// Replaces the positions in out.indices as out.slots or out.offsets say. `queries` is above 0.
template <class Source>
void launch_indices(const Source& keys, std::int64_t queries, int top_k, const Selection& out,
                    void* stream);

}  // namespace misa::cuda::select
