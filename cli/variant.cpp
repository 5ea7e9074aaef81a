// SPDX-License-Identifier: Apache-2.0
#include "variant.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstdint>

#include "misa/error.hpp"

namespace misa::cli {
namespace {

[[noreturn]] void fail(std::string_view text, std::string_view expected, std::string_view got) {
  throw Error(ErrorCode::invalid_argument,
              fmt::format("--indexers {}: expected {}, got '{}'", text, expected, got));
}

// Removes the text up to the next colon from the front of `rest` and returns it.
std::string_view pop_front_part(std::string_view& rest) {
  const std::size_t end = std::min(rest.find(':'), rest.size());
  const std::string_view part = rest.substr(0, end);
  rest.remove_prefix(std::min(end + 1, rest.size()));
  return part;
}

int number(std::string_view text, std::string_view value, int unit = 1) {
  int count = 0;
  const auto [end, error] = std::from_chars(value.data(), value.data() + value.size(), count);
  const std::int64_t result = std::int64_t{count} * unit;
  if (error != std::errc{} || end != value.data() + value.size() ||
      result != static_cast<int>(result)) {
    fail(text, "a number", value);
  }
  return static_cast<int>(result);
}

// A number, or a multiple of top_k if it ends with k.
int multiple(std::string_view text, std::string_view value, int top_k) {
  return value.ends_with('k') ? number(text, value.substr(0, value.size() - 1), top_k)
                              : number(text, value);
}

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
  std::string_view rest = text;
  const std::string_view name = pop_front_part(rest);
  IndexerConfig config = indexer_by_name(name, top_k);
  while (!rest.empty()) {
    const std::string_view setting = pop_front_part(rest);
    const std::size_t equals = std::min(setting.find('='), setting.size());
    const std::string_view key = setting.substr(0, equals);
    const std::string_view value = setting.substr(std::min(equals + 1, setting.size()));
    if (key == "h") {
      config.heads = number(text, value);
    } else if (key == "m") {
      config.candidates = multiple(text, value, top_k);
    } else if (key == "sketch") {
      config.sketch = number(text, value);
    } else if (key == "dense") {
      config.dense_work = multiple(text, value, top_k);
    } else if (key == "B") {
      (config.filter_block > 0 ? config.filter_block : config.block) = number(text, value);
    } else if (key == "blocks") {
      config.filter_blocks = number(text, value);
    } else if (key == "router") {
      config.router = router_by_name(value);
    } else {
      fail(text, "h=, m=, sketch=, dense=, B=, blocks= or router=", setting);
    }
  }
  return {std::string(text), label_of(name, config), config};
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
