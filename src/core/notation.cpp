// SPDX-License-Identifier: Apache-2.0
#include "core/notation.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <charconv>
#include <cstdint>

#include "misa/error.hpp"

namespace misa {
namespace {

// Removes the text up to the next colon from the front of `rest` and returns it.
std::string_view pop_front_part(std::string_view& rest) {
  const std::size_t end = std::min(rest.find(':'), rest.size());
  const std::string_view part = rest.substr(0, end);
  rest.remove_prefix(std::min(end + 1, rest.size()));
  return part;
}

// The settings of `text`, one after the other.
class Settings {
 public:
  Settings(std::string_view text, std::string_view rest) : text_(text), rest_(rest) {}

  // Whether there is a setting; it is then the current one.
  bool next() {
    if (rest_.empty()) {
      return false;
    }
    setting_ = pop_front_part(rest_);
    const std::size_t equals = std::min(setting_.find('='), setting_.size());
    key_ = setting_.substr(0, equals);
    value_ = setting_.substr(std::min(equals + 1, setting_.size()));
    return true;
  }
  [[nodiscard]] std::string_view key() const { return key_; }
  [[nodiscard]] std::string_view value() const { return value_; }

  // The value as a number, or as a multiple of top_k if it ends with k.
  [[nodiscard]] int number() const { return times(value_, 1); }
  [[nodiscard]] int multiple(int top_k) const {
    return value_.ends_with('k') ? times(value_.substr(0, value_.size() - 1), top_k) : number();
  }

  [[noreturn]] void fail_as_unknown() const {
    fail("h=, m=, sketch=, dense=, B=, blocks= or router=", setting_);
  }

 private:
  [[nodiscard]] int times(std::string_view digits, int unit) const {
    int count = 0;
    const char* end = digits.data() + digits.size();
    const auto [stop, error] = std::from_chars(digits.data(), end, count);
    const std::int64_t result = std::int64_t{count} * unit;
    if (error != std::errc{} || stop != end || count < 0 || result != static_cast<int>(result)) {
      fail(fmt::format("a number after {}=", key_), value_);
    }
    return static_cast<int>(result);
  }
  [[noreturn]] void fail(std::string_view expected, std::string_view got) const {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{}: expected {}, got '{}'", text_, expected, got));
  }

  std::string_view text_;
  std::string_view rest_;
  std::string_view setting_;
  std::string_view key_;
  std::string_view value_;
};

}  // namespace

NotedIndexer indexer_of_notation(std::string_view text, int top_k) {
  std::string_view rest = text;
  const std::string_view name = pop_front_part(rest);
  IndexerConfig config = indexer_by_name(name, top_k);
  bool candidates_given = false;
  for (Settings settings(text, rest); settings.next();) {
    if (settings.key() == "h") {
      config.heads = settings.number();
    } else if (settings.key() == "m") {
      config.candidates = settings.multiple(top_k);
      candidates_given = true;
    } else if (settings.key() == "sketch") {
      config.sketch = settings.number();
    } else if (settings.key() == "dense") {
      config.dense_work = settings.multiple(top_k);
    } else if (settings.key() == "B") {
      (config.filter_block > 0 ? config.filter_block : config.block) = settings.number();
    } else if (settings.key() == "blocks") {
      config.filter_blocks = settings.number();
    } else if (settings.key() == "router") {
      config.router = router_by_name(settings.value());
    } else {
      settings.fail_as_unknown();
    }
  }
  if (config.sketch != 0 && !candidates_given) {
    config.candidates = IndexerConfig::candidates_of_sketch(config.sketch, top_k);
  }
  return {name, config};
}

}  // namespace misa
