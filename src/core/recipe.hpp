// SPDX-License-Identifier: Apache-2.0
// What a configuration means for a row, a query and the keys that it sees: the one definition that
// every executor obeys (reference, CPU, CUDA, the distributed form) and that costs are told from.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "misa/indexer.hpp"

namespace misa {

// The keys that a router looks at.
enum class RouterKeys : std::uint8_t {
  none,         // only the query's heads and weights
  block_means,  // means of blocks of all keys that the query sees
  sampled,      // the sample grid (sample_stride)
  last,         // the last key that the query sees
};

struct RouterTraits {
  std::string_view name;
  RouterKeys keys;
};

// In the order of Router.
inline constexpr std::array<RouterTraits, 8> kRouters{{{"all", RouterKeys::none},
                                                       {"pooled", RouterKeys::block_means},
                                                       {"nonlinearity", RouterKeys::sampled},
                                                       {"dispersion", RouterKeys::sampled},
                                                       {"self", RouterKeys::last},
                                                       {"qnorm", RouterKeys::none},
                                                       {"weight", RouterKeys::none},
                                                       {"static", RouterKeys::none}}};
static_assert(kRouters.size() == static_cast<std::size_t>(Router::fixed) + 1);

constexpr const RouterTraits& traits_of(Router router) {
  return kRouters[static_cast<std::size_t>(router)];
}

// The sample grid of MISA-R and `dispersion`: positions 0, s, 2s, … below n, s the smallest power
// of two with s >= n / 128. A function of n alone.
inline constexpr std::int64_t kMaxSamples = 128;

constexpr std::int64_t sample_stride(std::int64_t n) {
  std::int64_t stride = 1;
  while (stride * kMaxSamples < n) {
    stride *= 2;
  }
  return stride;
}

constexpr std::int64_t sample_count(std::int64_t n) {
  const std::int64_t stride = sample_stride(n);
  return (n + stride - 1) / stride;
}

// gamma of the nonlinearity: the chance kept for heads that the sample never made fire.
inline constexpr float kFireChance = 0.1F;

// Rows of at most so many keys are DSA's (dense_work).
constexpr std::int64_t dense_keys(const IndexerConfig& config, std::int64_t heads) {
  return config.dense_work / heads;
}

// Whether a configuration that routes routes every head (h = H). It is DSA behind the same block
// filter then: nothing is left for a residual row or a re-rank to add, and every head is active.
inline bool routes_every_head(const IndexerConfig& config, std::int64_t heads) {
  return config.router != Router::all && config.heads == heads;
}

// What a configuration computes for H heads: itself, or the same without routing if that would
// leave no head out.
inline IndexerConfig effective_config(IndexerConfig config, std::int64_t heads) {
  if (routes_every_head(config, heads)) {
    config.router = Router::all;
    config.heads = 0;
    config.static_heads.clear();
    config.residual = false;
    config.candidates = 0;
  }
  return config;
}

// What is done for a row.
struct Recipe {
  bool dense = false;     // the row is DSA's, whatever else is configured: nothing below applies
  bool routed = false;    // active heads are chosen, and with a residual its row, and reported
  bool sampled = false;   // which takes the sample grid
  bool filtered = false;  // only the keys of kept blocks are scored
  bool active = false;    // the active heads score; else all heads do
  bool residual = false;  // and a residual row with them
  bool reranked = false;  // all heads score what the first selection kept, and the best remain

  std::int64_t heads = 0;   // that score first: h or H
  std::int64_t scored = 0;  // keys that they score: n, or those of the kept blocks
  std::int64_t keep = 0;    // what the first selection keeps of those at the most: k, or m
};

// For a row of n keys and H heads.
Recipe recipe_of(const IndexerConfig& config, std::int64_t heads, std::int64_t n);

// What rows of up to `max_keys` keys take together: what is done for one of them is set, and sizes
// are the largest.
Recipe largest_recipe(const IndexerConfig& config, std::int64_t heads, std::int64_t max_keys);

// Work that a row's indexer has to do, whatever the implementation. Rows that are selected whole
// take none.
struct Cost {
  double dots = 0;   // dot products of D elements
  double bytes = 0;  // of keys and block means that they read, each time anew
};
Cost cost_of(const IndexerConfig& config, const Shape& shape, std::int64_t n);

}  // namespace misa
