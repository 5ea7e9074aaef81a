// SPDX-License-Identifier: Apache-2.0
// Shared by the tests of the indexers: every test runs for every backend of this machine.
#pragma once

#include <gtest/gtest.h>

#include <algorithm>
#include <string>
#include <string_view>
#include <vector>

#include "misa/indexer.hpp"
#include "support/check.hpp"
#include "support/inputs.hpp"

namespace misa::test {

class EachBackend : public ::testing::TestWithParam<std::string> {
 protected:
  [[nodiscard]] Context context(int threads = 1) const { return context_for(GetParam(), threads); }

  template <class Inputs>
  [[nodiscard]] ::testing::AssertionResult valid(const IndexerConfig& config, const Inputs& inputs,
                                                 const Selected& result) const {
    return test::valid(config, inputs, result, GetParam());
  }
};

// A backend's name as part of a test's name, which cannot contain '-'.
inline std::string identifier(std::string name) {
  std::replace(name.begin(), name.end(), '-', '_');
  return name;
}

inline std::string backend_name(const ::testing::TestParamInfo<std::string>& info) {
  return identifier(info.param);
}

struct NamedConfig {
  std::string name;
  IndexerConfig config;
};

// The six indexers, and MISA-R with a re-rank, small enough that every stage has work at a few
// hundred positions.
inline std::vector<NamedConfig> named_configs(int top_k, int heads) {
  IndexerConfig automatic = IndexerConfig::automatic(top_k);
  automatic.heads = heads;
  automatic.dense_work = 25 * top_k;  // with 6 or 8 heads, rows of up to a few times top_k keys
  std::vector<NamedConfig> configs{
      {"dsa", IndexerConfig::dsa(top_k)},
      {"misa", IndexerConfig::misa(top_k, heads)},
      {"misa-dagger", IndexerConfig::misa_dagger(top_k, heads, 2 * top_k + 1)},
      {"misa-r", IndexerConfig::misa_r(top_k, heads)},
      {"misa-r re-ranked", IndexerConfig::misa_r(top_k, heads, 2 * top_k)},
      {"hisa", IndexerConfig::hisa(top_k, 64, 2 + (top_k + 63) / 64)},
      {"auto", automatic},
  };
  for (NamedConfig& named : configs) {
    named.config.block = 128;
  }
  return configs;
}

// Re-ranked indexers whose first scores come from a sketch of e4m3 keys, of 2 or 4 bits.
inline std::vector<NamedConfig> sketched_configs(int top_k, int heads, int sketch) {
  IndexerConfig every_head = IndexerConfig::dsa(top_k);
  every_head.candidates = top_k + top_k / 2;
  IndexerConfig filtered = IndexerConfig::misa_r(top_k, heads, 2 * top_k);
  filtered.filter_block = 64;
  filtered.filter_blocks = 3 + (top_k + 63) / 64;
  std::vector<NamedConfig> configs{
      {"misa-dagger", IndexerConfig::misa_dagger(top_k, heads, 2 * top_k + 1)},
      {"misa-r", IndexerConfig::misa_r(top_k, heads, 2 * top_k)},
      {"linear", IndexerConfig::misa_r(top_k, 0, 2 * top_k)},
      {"every head", every_head},
      {"hisa x misa-r", filtered}};
  for (NamedConfig& named : configs) {
    named.name += ", " + std::to_string(sketch) + "-bit";
    named.config.sketch = sketch;
    named.config.block = 128;
  }
  return configs;
}

// Those of 2 bits and those of 4.
inline std::vector<NamedConfig> sketched_configs(int top_k, int heads) {
  std::vector<NamedConfig> configs = sketched_configs(top_k, heads, 2);
  const std::vector<NamedConfig> finer = sketched_configs(top_k, heads, 4);
  configs.insert(configs.end(), finer.begin(), finer.end());
  return configs;
}

// Every combination of block filter, router, residual and re-rank.
inline std::vector<NamedConfig> compositions(int top_k, int heads) {
  std::vector<NamedConfig> configs;
  for (const bool filter : {false, true}) {
    for (const std::string_view router : router_names()) {
      for (const bool residual : {false, true}) {
        for (const int candidates : {0, 2 * top_k}) {
          IndexerConfig config;
          config.top_k = top_k;
          config.router = router_by_name(router);
          config.heads = heads;
          config.block = 64;
          config.residual = residual;
          config.filter_block = filter ? 64 : 0;
          config.filter_blocks = 2 + (top_k + 63) / 64;
          config.candidates = candidates;
          if (config.router == Router::all && residual) {
            continue;
          }
          if (config.router == Router::fixed) {
            for (int j = heads - 1; j >= 0; --j) {
              config.static_heads.push_back(2 * j);
            }
          }
          configs.push_back({std::string(router) + (filter ? ", filter" : "") +
                                 (residual ? ", residual" : "") +
                                 (candidates > 0 ? ", re-rank" : ""),
                             config});
        }
      }
    }
  }
  return configs;
}

}  // namespace misa::test
