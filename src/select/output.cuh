// SPDX-License-Identifier: Apache-2.0
// Where the selection of a row is written.
#pragma once

#include <cstdint>

#include "misa/cuda.hpp"

namespace misa::cuda::select {

// Where a row of the output starts; scores is null if they are not requested.
struct OutputRow {
  std::int32_t* indices;
  float* scores;
};

__device__ inline OutputRow output_row(const TopK& out, std::int64_t row, std::uint32_t top_k) {
  const std::int64_t index_stride = out.index_stride != 0 ? out.index_stride : top_k;
  const std::int64_t score_stride = out.score_stride != 0 ? out.score_stride : top_k;
  return {out.indices + row * index_stride,
          out.scores != nullptr ? out.scores + row * score_stride : nullptr};
}

}  // namespace misa::cuda::select
