// What a stage has to do, counted: the floating-point operations and the bytes that no
// implementation can avoid. Times are read against these.
#pragma once

#include <cstdint>

#include "misa/indexer.hpp"

namespace misa::bench {

struct Work {
  double flops;
  double bytes;
};

// Scoring: `rows` dot products of D and a max, a multiply and an add for each of pairs
// (query, key); queries, weights and keys read once, nothing written.
inline Work score_work(std::int64_t queries, std::int64_t keys, std::int64_t rows, std::int64_t dim,
                       DType dtype) {
  const auto t = static_cast<double>(queries);
  const auto l = static_cast<double>(keys);
  const auto h = static_cast<double>(rows);
  const auto d = static_cast<double>(dim);
  const auto element = static_cast<double>(size_of(dtype));
  const double scale = dtype == DType::e4m3 ? 4 : 0;
  return {t * l * h * (2 * d + 3), t * h * (d * element + 4) + l * (d * element + scale)};
}

// Selection alone: each score read once, the indices written once.
inline Work select_work(std::int64_t queries, std::int64_t keys, std::int64_t top_k) {
  return {0, 4 * static_cast<double>(queries) * static_cast<double>(keys + top_k)};
}

// A whole step: the first stage's rows over every key, the router's dot products with what it
// looks at, and all heads over the candidates.
inline Work step_work(const IndexerConfig& config, const Shape& shape) {
  const std::int64_t all = shape.heads;
  const bool routed = config.router != Router::all;
  const std::int64_t rows = routed ? config.heads + (config.residual ? 1 : 0) : all;
  std::int64_t keys = shape.max_keys;
  std::int64_t probes = 0;  // keys that every head meets before scoring
  if (config.filter_block > 0) {
    probes += keys / config.filter_block;
    keys = std::min<std::int64_t>(keys, std::int64_t{config.filter_block} * config.filter_blocks);
  }
  if (config.router == Router::pooled) {
    probes += shape.max_keys / config.block;
  } else if (routed) {
    probes += 128;
  }
  const auto of = [&](std::int64_t count, std::int64_t heads) {
    return score_work(shape.tokens, count, heads, shape.dim, shape.k_dtype);
  };
  const Work first = of(keys, rows);
  return {first.flops + of(probes, all).flops + of(config.candidates, all).flops, first.bytes};
}

}  // namespace misa::bench
