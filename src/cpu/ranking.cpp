// SPDX-License-Identifier: Apache-2.0
#include "cpu/ranking.hpp"

#include <algorithm>
#include <functional>

#include "core/entry.hpp"

namespace misa::cpu {

void top_indices(std::span<const float> values, std::int64_t keep, std::uint64_t* scratch,
                 std::int32_t* out) {
  for (std::size_t i = 0; i < values.size(); ++i) {
    scratch[i] = make_entry(values[i], static_cast<std::uint32_t>(i));
  }
  std::nth_element(scratch, scratch + keep, scratch + values.size(), std::greater<>());
  for (std::int64_t i = 0; i < keep; ++i) {
    out[i] = static_cast<std::int32_t>(entry_position(scratch[i]));
  }
  std::sort(out, out + keep);
}

}  // namespace misa::cpu
