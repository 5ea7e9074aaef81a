// SPDX-License-Identifier: Apache-2.0
// What a configuration computes for a row (a query and the keys that it sees). Every implementation
// (reference, CPU, CUDA, the distributed form) follows this definition, and costs are computed from
// it.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <string_view>

#include "core/ceil_div.hpp"
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

// Indexed by Router.
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

constexpr std::int64_t sample_count(std::int64_t n) { return ceil_div(n, sample_stride(n)); }

// gamma of the nonlinearity: the weight of the term that gives heads a value although none of their
// dot products with the samples was positive.
inline constexpr float kFireChance = 0.1F;

// Rows of at most this many keys are computed as DSA (IndexerConfig::dense_work).
constexpr std::int64_t dense_keys(const IndexerConfig& config, std::int64_t heads) {
  return config.dense_work / heads;
}

// Whether a configuration with a router chooses every head (h = H). It then computes DSA after the
// same block filter: every head is active, and a residual row or a re-rank would change nothing.
inline bool routes_every_head(const IndexerConfig& config, std::int64_t heads) {
  return config.router != Router::all && config.heads == heads;
}

// The configuration that is computed for H heads: `config`, without its routing if that would
// choose every head.
inline IndexerConfig effective_config(IndexerConfig config, std::int64_t heads) {
  if (routes_every_head(config, heads)) {
    config.router = Router::all;
    config.heads = 0;
    config.static_heads.clear();
    config.residual = false;
    config.candidates = 0;
    config.sketch = 0;
  }
  return config;
}

// The steps for a row.
struct Recipe {
  bool dense = false;     // the row is computed as DSA: no other flag is set
  bool routed = false;    // heads (and the residual row, if configured) are chosen and reported
  bool sampled = false;   // and this needs the sample grid
  bool filtered = false;  // only the keys of kept blocks are scored
  bool active = false;    // the active heads give the first scores; else all heads do
  bool residual = false;  // and the residual row with them
  bool sketched = false;  // and they are computed from the keys' sketch
  bool reranked = false;  // all heads score what the first selection kept, and the best remain

  std::int64_t heads = 0;   // that give the first scores: h or H
  std::int64_t scored = 0;  // keys with a first score: n, or those of the kept blocks
  std::int64_t keep = 0;    // the most keys that the first selection keeps: k or m
};

// For a row of n keys and H heads.
Recipe recipe_of(const IndexerConfig& config, std::int64_t heads, std::int64_t n);

// The recipe of rows of `max_keys` keys, but `scored` is the most keys that any shorter row scores.
// Shorter rows, unless computed as DSA, select the same keys by it as by their recipe_of.
Recipe largest_recipe(const IndexerConfig& config, std::int64_t heads, std::int64_t max_keys);

// The work for a row, whatever the implementation. A row of which all keys are selected costs
// nothing.
struct Cost {
  double dots = 0;   // dot products of D elements
  double bytes = 0;  // of keys and block means that these read, counted at every read
};
Cost cost_of(const IndexerConfig& config, const Shape& shape, std::int64_t n);

}  // namespace misa
