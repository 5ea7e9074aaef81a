// SPDX-License-Identifier: Apache-2.0
#pragma once

#include <cstdint>

#include "score/columns.hpp"

namespace misa::cuda::score {

__device__ inline void write_length(const RowLengths& lengths, std::int64_t t, std::int32_t count) {
  if (lengths.all != nullptr) {
    lengths.all[t] = count;
  }
  if (lengths.candidates != nullptr) {
    lengths.candidates[t] = min(count, lengths.keep);
  }
}

}  // namespace misa::cuda::score
