// SPDX-License-Identifier: Apache-2.0
// The block filter: the first and the last block are always kept; the others compete.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace misa::reference {

// The first and the last of `blocks` blocks, and the blocks `best`, which ascend between them.
std::vector<std::int64_t> kept_blocks(std::int64_t blocks, std::span<const std::int64_t> best);

// The positions, ascending, in blocks that ascend. The last block ends at `length`.
std::vector<std::int64_t> positions_of_blocks(std::span<const std::int64_t> kept,
                                              std::int64_t block, std::int64_t length);

}  // namespace misa::reference
