// SPDX-License-Identifier: Apache-2.0
// One validated call on block means, as every backend sees it.
#pragma once

#include <cstdint>
#include <span>

#include "core/problem.hpp"

namespace misa {

// The means of whole blocks stand where a problem has its keys, as f32 ones: position b of query t
// is the mean of its block b, and visible(t) counts its whole blocks.
struct MeansProblem {
  Problem problem;
  std::span<const std::int32_t> partial;  // [T] rows of partial blocks' means, -1: none; or empty
  std::span<std::int32_t> out;            // [T, width]
  std::int64_t width;

  // The mean of the block that query t sees in part; null if it sees none so.
  [[nodiscard]] const float* partial_mean(std::int64_t t) const {
    if (partial.empty() || partial[t] < 0) {
      return nullptr;
    }
    const auto& means = std::get<RaggedSource>(problem.keys);
    return static_cast<const float*>(means.data) + partial[t] * means.token_stride;
  }

  // How many blocks query t sees.
  [[nodiscard]] std::int64_t blocks(std::int64_t t) const {
    return problem.visible(t) + (partial_mean(t) != nullptr ? 1 : 0);
  }

  [[nodiscard]] std::span<std::int32_t> row(std::int64_t t) const {
    return out.subspan(static_cast<std::size_t>(t * width), static_cast<std::size_t>(width));
  }
};

}  // namespace misa
