// SPDX-License-Identifier: Apache-2.0
#include "variant.hpp"

#include <fmt/format.h>

#include "core/notation.hpp"
#include "misa/error.hpp"

namespace misa::cli {
namespace {

std::string label_of(std::string_view name, const IndexerConfig& config) {
  std::string label = "DSA";
  if (name == "auto") {
    label = "Auto";
  } else if (name == "hisa") {
    label = fmt::format("HISA {}×{}", config.filter_blocks, config.filter_block);
  } else if (name != "dsa") {
    label = config.residual ? "MISA-R" : config.candidates > 0 ? "MISA†" : "MISA";
  }
  if (config.router != Router::all) {
    label += fmt::format(" {}{}", config.heads, config.residual ? "+1" : "");
  }
  if (config.router != indexer_by_name(name).router) {
    label += fmt::format(" {}", name_of(config.router));
  }
  if (config.candidates > 0) {
    label += fmt::format(" m={}", config.candidates);
  }
  if (config.sketch != 0) {
    label += fmt::format(" {}-bit", config.sketch);
  }
  if (config.dense_work != indexer_by_name(name, config.top_k).dense_work) {
    label += fmt::format(" dense={}", config.dense_work);
  }
  return label;
}

}  // namespace

Variant parse_variant(std::string_view text, int top_k) {
  try {
    const NotedIndexer indexer = indexer_of_notation(text, top_k);
    return {std::string(text), label_of(indexer.name, indexer.config), indexer.config};
  } catch (const Error& error) {
    throw Error(error.code(), fmt::format("--indexers: {}", error.what()));
  }
}

std::vector<Variant> parse_variants(const std::vector<std::string>& texts, int top_k) {
  std::vector<Variant> variants;
  for (const std::string& text : texts) {
    variants.push_back(parse_variant(text, top_k));
    variants.back().given = texts != default_variants();
  }
  return variants;
}

nlohmann::ordered_json settings_of(const IndexerConfig& config) {
  return {{"top_k", config.top_k},
          {"router", name_of(config.router)},
          {"heads", config.heads},
          {"block", config.block},
          {"residual", config.residual},
          {"filter_block", config.filter_block},
          {"filter_blocks", config.filter_blocks},
          {"candidates", config.candidates},
          {"sketch", config.sketch},
          {"dense_work", config.dense_work},
          {"ordered", config.ordered},
          {"static_heads", config.static_heads}};
}

const std::vector<std::string>& default_variants() {
  static const std::vector<std::string> variants{
      "dsa", "misa", "misa-dagger", "hisa", "misa-r", "misa-r:h=3:m=2k", "misa-r:h=3:m=4k", "auto"};
  return variants;
}

}  // namespace misa::cli
