// SPDX-License-Identifier: Apache-2.0
// The block filter: the first and the last block are always kept; the others compete.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace misa::reference {

// The positions, ascending, in the first and the last of `blocks` blocks and in the blocks `best`,
// which ascend between them. The last block ends at `length`.
std::vector<std::int64_t> positions_of_blocks(std::int64_t blocks, std::int64_t block,
                                              std::int64_t length,
                                              std::span<const std::int64_t> best);

}  // namespace misa::reference
