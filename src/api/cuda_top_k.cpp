// SPDX-License-Identifier: Apache-2.0
#include <limits>
#include <utility>

#include "core/require.hpp"
#include "cuda/launch.cuh"
#include "misa/cuda.hpp"
#include "select/generic.hpp"

namespace misa::cuda {

void top_k(const Logits& logits, int top_k, const TopK& out, void* stream) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  require(logits.rows >= 0 && logits.rows <= kMost, "rows: expected 0 to {}, got {}", kMost,
          logits.rows);
  require(logits.columns >= 0 && logits.columns <= kMost, "columns: expected 0 to {}, got {}",
          kMost, logits.columns);
  require(logits.row_stride == 0 || logits.row_stride >= logits.columns,
          "row_stride: expected 0 or at least {} columns, got {}", logits.columns,
          logits.row_stride);
  require(top_k >= 1 && top_k <= kMaxTopK, "top_k: expected 1 to {}, got {}", kMaxTopK, top_k);
  Logits rows = logits;
  rows.row_stride = logits.row_stride != 0 ? logits.row_stride : logits.columns;
  checked_multiply_add("logits", rows.rows, rows.row_stride);
  for (const auto& [name, stride] :
       {std::pair{"index_stride", out.index_stride}, {"score_stride", out.score_stride}}) {
    require(stride == 0 || stride >= top_k, "{}: expected 0 or at least top_k = {}, got {}", name,
            top_k, stride);
    checked_multiply_add(name, rows.rows, stride);
  }
  require_data("logits", rows.data, rows.rows * rows.columns, alignof(float));
  require_data("lengths", rows.lengths, 0, alignof(std::int32_t));
  require_data("indices", out.indices, rows.rows * top_k, alignof(std::int32_t));
  require_data("scores", out.scores, 0, alignof(float));
  if (rows.rows > 0) {
    select::launch_generic(rows, top_k, out, true, device_attribute(cudaDevAttrMultiProcessorCount),
                           stream);
  }
}

}  // namespace misa::cuda
