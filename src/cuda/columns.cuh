// SPDX-License-Identifier: Apache-2.0
// Which position a column of a query's scores stands for.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"

namespace misa::cuda {

// The position that a column stands for; -1 if there is none or it is not below n. Safe whatever
// the list holds.
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
