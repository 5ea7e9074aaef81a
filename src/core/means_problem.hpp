// SPDX-License-Identifier: Apache-2.0
// One validated call on block means, as every backend gets it.
#pragma once

#include <cstdint>
#include <span>

#include "core/problem.hpp"

namespace misa {

// problem.keys holds the means of whole blocks as f32 keys: the key at position b of query t is the
// mean of the query's block b, and visible(t) is the number of its whole blocks.
struct MeansProblem {
  Problem problem;
  std::span<const std::int32_t> partial;  // [T] row of the partial block's mean, -1: none; or empty
  std::span<std::int32_t> out;            // [T, width]
  std::int64_t width;

  // The mean of query t's partial block; null if it has none.
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
