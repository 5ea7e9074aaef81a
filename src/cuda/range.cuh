// SPDX-License-Identifier: Apache-2.0
// Which keys a query sees and which of them a column of its scores stands for, safe whatever the
// arrays hold.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"

namespace misa::cuda {

struct Range {
  std::int32_t start;   // of the keys, 0 <= start, start + length <= L
  std::int32_t length;  // n >= 0
};

__device__ inline Range visible(const Keys& k, std::int64_t t) {
  const auto tokens = static_cast<std::int32_t>(k.tokens);
  const std::int32_t start = min(max(k.starts[t], 0), tokens);
  const std::int32_t end = min(max(k.ends[t], start), tokens);
  const std::int32_t length = min(end - start, k.max_keys);
  return {start, length < k.least_keys || length > k.most_keys ? 0 : length};
}

// The position that a column stands for; -1 if it stands for none below n.
__device__ inline std::int32_t position_of(const Columns& columns, std::int64_t t,
                                           std::int64_t column, std::int32_t n) {
  std::int64_t position = column;
  if (columns.list != nullptr) {
    const auto block = static_cast<std::uint32_t>(columns.block);
    const std::uint32_t place = static_cast<std::uint32_t>(column) / block;
    const std::int64_t entry = columns.list[t * columns.width + place];
    position = entry < 0 ? n : (entry - place) * block + column;
  }
  return position < n ? static_cast<std::int32_t>(position) : -1;
}

}  // namespace misa::cuda
