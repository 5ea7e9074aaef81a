// SPDX-License-Identifier: Apache-2.0
// The block filter: the first and the last block are always kept; the others compete.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace misa::reference {

// The kept ones of `blocks` blocks, ascending: the first, the blocks `best` (ascending), the last.
std::vector<std::int64_t> kept_blocks(std::int64_t blocks, std::span<const std::int64_t> best);

// The positions in the `kept` blocks. Both ascend. The last block of the row ends at `length`.
std::vector<std::int64_t> positions_of_blocks(std::span<const std::int64_t> kept,
                                              std::int64_t block, std::int64_t length);

}  // namespace misa::reference
