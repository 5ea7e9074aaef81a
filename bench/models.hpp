// SPDX-License-Identifier: Apache-2.0
// The floating-point operations and the bytes of a stage that no implementation can avoid. Times
// are compared with these.
#pragma once

#include <cstdint>

#include "core/key_format.hpp"
#include "core/recipe.hpp"
#include "misa/indexer.hpp"

namespace misa::bench {

struct Work {
  double flops;
  double bytes;
};

// Scoring: for each pair of query and key, `rows` dot products of D, each with a max, a multiply
// and an add; queries, weights and keys are read once, nothing is written.
inline Work score_work(std::int64_t queries, std::int64_t keys, std::int64_t rows, std::int64_t dim,
                       DType dtype) {
  const auto t = static_cast<double>(queries);
  const auto l = static_cast<double>(keys);
  const auto h = static_cast<double>(rows);
  const auto d = static_cast<double>(dim);
  const auto element = static_cast<double>(size_of(dtype));
  const auto key = static_cast<double>(format_of(dtype).key_bytes(dim));
  return {t * l * h * (2 * d + 3), t * h * (d * element + 4) + l * key};
}

// Selection alone: each score is read once, each index is written once.
inline Work select_work(std::int64_t queries, std::int64_t keys, std::int64_t top_k) {
  return {0, 4 * static_cast<double>(queries) * static_cast<double>(keys + top_k)};
}

// A whole step: the sum of cost_of over the last queries of a causal context.
inline Work step_work(const IndexerConfig& config, const Shape& shape) {
  Work work{0, 0};
  for (std::int64_t t = 0; t < shape.tokens; ++t) {
    const Cost row = cost_of(config, shape, shape.max_keys - shape.tokens + t + 1);
    work.flops += row.dots * (2 * static_cast<double>(shape.dim) + 3);
    work.bytes += row.bytes;
  }
  return work;
}

}  // namespace misa::bench
