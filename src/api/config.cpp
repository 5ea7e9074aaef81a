// SPDX-License-Identifier: Apache-2.0
// The named indexers and routers.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/recipe.hpp"
#include "misa/error.hpp"
#include "misa/indexer.hpp"

namespace misa {
namespace {

constexpr std::array<std::string_view, 6> kIndexers{"dsa",    "misa", "misa-dagger",
                                                    "misa-r", "hisa", "auto"};

constexpr auto kRouterNames = [] {
  std::array<std::string_view, kRouters.size()> names;
  std::ranges::transform(kRouters, names.begin(), &RouterTraits::name);
  return names;
}();

// The index of a name in a list; `kind` is what the error message calls the name.
std::size_t index_of(std::string_view name, std::string_view kind,
                     std::span<const std::string_view> names) {
  const auto found = std::find(names.begin(), names.end(), name);
  if (found == names.end()) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{}: expected {}, got '{}'", kind, fmt::join(names, ", "), name));
  }
  return static_cast<std::size_t>(found - names.begin());
}

// The product, or the largest int.
int times(int factor, int top_k) {
  constexpr std::int64_t kMost = std::numeric_limits<int>::max();
  return static_cast<int>(std::min(std::int64_t{factor} * top_k, kMost));
}

}  // namespace

IndexerConfig IndexerConfig::dsa(int top_k) {
  IndexerConfig config;
  config.top_k = top_k;
  return config;
}

IndexerConfig IndexerConfig::misa(int top_k, int heads) {
  IndexerConfig config = dsa(top_k);
  config.router = Router::pooled;
  config.heads = heads;
  return config;
}

IndexerConfig IndexerConfig::misa_dagger(int top_k, int heads, int candidates) {
  IndexerConfig config = misa(top_k, heads);
  config.candidates = candidates;
  return config;
}

IndexerConfig IndexerConfig::misa_r(int top_k, int heads, int candidates) {
  IndexerConfig config = dsa(top_k);
  config.router = Router::nonlinearity;
  config.heads = heads;
  config.residual = true;
  config.candidates = candidates;
  return config;
}

IndexerConfig IndexerConfig::hisa(int top_k, int filter_block, int filter_blocks) {
  IndexerConfig config = dsa(top_k);
  config.filter_block = filter_block;
  config.filter_blocks = filter_blocks;
  return config;
}

int IndexerConfig::candidates_of_sketch(int bits, int top_k) {
  switch (bits) {
    case 2: return times(8, top_k);
    case 4: return times(2, top_k);
    default: return 0;
  }
}

IndexerConfig IndexerConfig::automatic(int top_k) {
  IndexerConfig config = misa_r(top_k, 3, times(2, top_k));
  config.dense_work = std::int64_t{512} * top_k;
  return config;
}

std::span<const std::string_view> indexer_names() { return kIndexers; }

IndexerConfig indexer_by_name(std::string_view name, int top_k) {
  switch (index_of(name, "indexer", kIndexers)) {
    case 0: return IndexerConfig::dsa(top_k);
    case 1: return IndexerConfig::misa(top_k);
    case 2: return IndexerConfig::misa_dagger(top_k);
    case 3: return IndexerConfig::misa_r(top_k);
    case 4: return IndexerConfig::hisa(top_k);
    default: return IndexerConfig::automatic(top_k);
  }
}

std::span<const std::string_view> router_names() { return kRouterNames; }

Router router_by_name(std::string_view name) {
  return static_cast<Router>(index_of(name, "router", kRouterNames));
}

std::string_view name_of(Router router) { return traits_of(router).name; }

}  // namespace misa
