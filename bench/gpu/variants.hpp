// SPDX-License-Identifier: Apache-2.0
// The indexers that a benchmark is asked for by name.
#pragma once

#include <numeric>
#include <string>
#include <utility>
#include <vector>

#include "variant.hpp"

namespace misa::bench {

inline std::vector<cli::Variant> variants_of(const std::vector<std::string>& indexers, int top_k) {
  std::vector<cli::Variant> variants;
  for (const std::string& name : indexers) {
    cli::Variant variant = cli::parse_variant(name, top_k);
    IndexerConfig& config = variant.config;
    if (config.router == Router::fixed) {  // any heads will do
      config.static_heads.resize(config.heads);
      std::iota(config.static_heads.begin(), config.static_heads.end(), 0);
    }
    variants.push_back(std::move(variant));
  }
  return variants;
}

}  // namespace misa::bench
