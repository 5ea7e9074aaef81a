// SPDX-License-Identifier: Apache-2.0
#include "filter/reference.hpp"

#include <algorithm>

namespace misa::reference {

std::vector<std::int64_t> kept_blocks(std::int64_t blocks, std::span<const std::int64_t> best) {
  std::vector<std::int64_t> kept{0};
  kept.insert(kept.end(), best.begin(), best.end());
  if (blocks > 1) {
    kept.push_back(blocks - 1);
  }
  return kept;
}

std::vector<std::int64_t> positions_of_blocks(std::span<const std::int64_t> kept,
                                              std::int64_t block, std::int64_t length) {
  std::vector<std::int64_t> positions;
  for (const std::int64_t b : kept) {
    const std::int64_t last = std::min((b + 1) * block, length);
    for (std::int64_t position = b * block; position < last; ++position) {
      positions.push_back(position);
    }
  }
  return positions;
}

}  // namespace misa::reference
