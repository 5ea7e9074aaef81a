// SPDX-License-Identifier: Apache-2.0
#include "core/recipe.hpp"

#include "core/ceil_div.hpp"
#include "core/key_format.hpp"
#include "core/sketch.hpp"

namespace misa {
namespace {

// The recipe of a row of which `scored` keys are scored, after the block filter if `filtered`.
Recipe with_scored(const IndexerConfig& config, std::int64_t heads, bool filtered,
                   std::int64_t scored) {
  Recipe recipe;
  recipe.filtered = filtered;
  recipe.scored = scored;
  recipe.routed = config.router != Router::all;
  recipe.sampled =
      recipe.routed && (config.residual || traits_of(config.router).keys == RouterKeys::sampled);
  // If every scored key would be a candidate, all heads score the keys in the first place. Without
  // routing the first scores are those of a re-rank too, unless they are computed from a sketch.
  const bool every_head = !recipe.routed || config.heads == heads;
  const bool sketch = config.sketch != 0 && !(recipe.routed && every_head);
  recipe.reranked = (!every_head || sketch) && config.candidates > 0 && config.candidates < scored;
  recipe.sketched = recipe.reranked && sketch;
  recipe.active = !every_head && (config.candidates == 0 || recipe.reranked);
  recipe.residual = recipe.active && config.residual;
  recipe.heads = recipe.active ? config.heads : heads;
  recipe.keep = recipe.reranked ? config.candidates : config.top_k;
  return recipe;
}

Recipe dense_recipe(const IndexerConfig& config, std::int64_t heads, std::int64_t n) {
  Recipe recipe;
  recipe.dense = true;
  recipe.heads = heads;
  recipe.scored = n;
  recipe.keep = config.top_k;
  return recipe;
}

}  // namespace
Recipe recipe_of(const IndexerConfig& config, std::int64_t heads, std::int64_t n) {
  if (config.takes_every_head(heads, n)) {
    return dense_recipe(config, heads, n);
  }
  const std::int64_t block = config.filter_block;
  if (block == 0 || ceil_div(n, block) <= config.filter_blocks) {
    return with_scored(config, heads, false, n);
  }
  const std::int64_t last = n - (ceil_div(n, block) - 1) * block;
  return with_scored(config, heads, true, (config.filter_blocks - 1) * block + last);
}

Recipe largest_recipe(const IndexerConfig& config, std::int64_t heads, std::int64_t max_keys) {
  if (max_keys <= dense_keys(config, heads)) {
    return dense_recipe(config, heads, max_keys);
  }
  const std::int64_t block = config.filter_block;
  const bool filtered = block > 0 && ceil_div(max_keys, block) > config.filter_blocks;
  return with_scored(config, heads, filtered, filtered ? config.filter_blocks * block : max_keys);
}

Cost cost_of(const IndexerConfig& config, const Shape& shape, std::int64_t n) {
  Cost cost;
  if (n <= config.top_k) {
    return cost;
  }
  const auto read = [&](std::int64_t keys, std::int64_t heads, double bytes) {
    cost.dots += static_cast<double>(keys) * static_cast<double>(heads);
    cost.bytes += static_cast<double>(keys) * bytes;
  };
  const auto key_bytes = static_cast<double>(format_of(shape.k_dtype).key_bytes(shape.dim));
  const double mean_bytes = static_cast<double>(shape.dim) * sizeof(float);

  const Recipe recipe = recipe_of(config, shape.heads, n);
  if (recipe.filtered) {
    read(ceil_div(n, config.filter_block), shape.heads, mean_bytes);
  }
  if (recipe.active) {
    const RouterKeys keys = traits_of(config.router).keys;
    if (keys == RouterKeys::block_means) {
      read(ceil_div(n, config.block), shape.heads, mean_bytes);
    } else if (keys == RouterKeys::last) {
      read(1, shape.heads, key_bytes);
    }
    if (recipe.sampled) {
      read(sample_count(n), shape.heads, key_bytes);
    }
  }
  const auto first_bytes =
      recipe.sketched ? static_cast<double>(sketch_key_bytes(config.sketch, shape.dim)) : key_bytes;
  read(recipe.scored, recipe.heads + (recipe.residual ? 1 : 0), first_bytes);
  if (recipe.reranked) {
    read(recipe.keep, shape.heads, key_bytes);
  }
  return cost;
}

}  // namespace misa
