// SPDX-License-Identifier: Apache-2.0
#include "options.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <array>
#include <charconv>
#include <cstdio>
#include <limits>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "misa/types.hpp"
#include "streams.hpp"

namespace misa::cli {
namespace {

// The size in bytes of the text's first UTF-8 character if that is a control character, breaks the
// line or changes the text's direction; otherwise 0.
std::size_t control_bytes(std::string_view text) {
  const auto at = [&](std::size_t i) {
    return i < text.size() ? static_cast<unsigned char>(text[i]) : 0U;
  };
  const auto within = [](unsigned value, unsigned first, unsigned last) {
    return value >= first && value <= last;
  };
  if (at(0) < 0x20 || at(0) == 0x7f) {
    return 1;
  }
  if (at(0) == 0xc2 && within(at(1), 0x80, 0x9f)) {  // U+0080 to U+009F
    return 2;
  }
  const bool breaks_or_turns =  // U+2028 to U+202E, U+2066 to U+2069
      at(0) == 0xe2 && ((at(1) == 0x80 && within(at(2), 0xa8, 0xae)) ||
                        (at(1) == 0x81 && within(at(2), 0xa6, 0xa9)));
  return breaks_or_turns ? 3 : 0;
}

// The whole number that all of the text is, if it is one.
std::optional<std::int64_t> whole(std::string_view text) {
  std::int64_t value = 0;
  const char* end = text.data() + text.size();
  const auto [stop, error] = std::from_chars(text.data(), end, value);
  return error == std::errc() && stop == end ? std::optional(value) : std::nullopt;
}

char upper(char c) { return c >= 'a' && c <= 'z' ? static_cast<char>(c - 'a' + 'A') : c; }

}  // namespace

void add_run_options(CLI::App& command, RunOptions& options) {
  command
      .add_option(
          "--backend", options.backend,
          "auto (the fastest that this machine runs), reference (double precision), cpu, or "
          "a name that `misa info` lists")
      ->type_name("NAME")
      ->capture_default_str();
  constexpr int kMaxThreads = 1024;
  command.add_option("--threads", options.threads, "Threads to use; 0: every one of this machine")
      ->type_name("N")
      ->check(whole_number(0, kMaxThreads))
      ->capture_default_str();
}

Context make_context(const RunOptions& options) {
  return Context({.backend = options.backend, .threads = options.threads});
}

void add_json_option(CLI::App& command, bool& json) {
  command.add_flag("--json", json, "Print JSON for programs in place of text for people");
}

void add_dtype_option(CLI::App& command, std::string& dtype) {
  using Names = std::pair<std::string_view, DType>;
  constexpr std::array<Names, 3> kNames{
      {{"F32", DType::f32}, {"BF16", DType::bf16}, {"F8_E4M3", DType::e4m3}}};
  const auto read = [=](std::string& text) -> std::string {
    for (const auto& [name, value] : kNames) {
      if (text == name || text == name_of(value)) {
        text = name;
        return {};
      }
    }
    return fmt::format("expected F32, BF16 or F8_E4M3, got '{}'", text);
  };
  command.add_option("--dtype", dtype, "Of queries and keys: F32, BF16 or F8_E4M3")
      ->type_name("NAME")
      ->transform(CLI::Validator(read, ""))
      ->capture_default_str();
}

CLI::Validator whole_number(std::int64_t least, std::int64_t most) {
  return CLI::Validator(
      [least, most](const std::string& text) -> std::string {
        if (const auto value = whole(text); value && *value >= least && *value <= most) {
          return {};
        }
        return fmt::format("expected a whole number from {} to {}, got '{}'", least, most, text);
      },
      "");
}

CLI::Validator whole_number(std::int64_t least) {
  return whole_number(least, std::numeric_limits<int>::max());
}

CLI::Validator size_number(std::int64_t least, std::int64_t most) {
  return CLI::Validator(
      [least, most](std::string& text) -> std::string {
        constexpr std::string_view kSuffixes = "KMG";
        std::string_view number = text;
        std::int64_t unit = 1;
        if (const std::size_t suffix =
                text.empty() ? kSuffixes.npos : kSuffixes.find(upper(text.back()));
            suffix != kSuffixes.npos) {
          number.remove_suffix(1);
          unit <<= 10 * (suffix + 1);
        }
        const std::optional<std::int64_t> value = whole(number);
        if (value && *value <= most / unit && *value >= least / unit && *value * unit >= least) {
          text = std::to_string(*value * unit);
          return {};
        }
        return fmt::format(
            "expected a whole number from {} to {}, K, M or G after it or not, got '{}'", least,
            most, text);
      },
      "");
}

CLI::Validator one_of(std::span<const std::string_view> words) {
  return CLI::Validator(
      [words = std::vector<std::string_view>(words.begin(), words.end())](const std::string& text) {
        const bool found = std::find(words.begin(), words.end(), text) != words.end();
        return found ? "" : fmt::format("expected {}, got '{}'", fmt::join(words, ", "), text);
      },
      "");
}

void print_json(const nlohmann::ordered_json& json) {
  // A file name need not be UTF-8.
  constexpr auto kReplace = nlohmann::ordered_json::error_handler_t::replace;
  write_out(json.dump(2, ' ', false, kReplace) + '\n');
}

std::string one_line(std::string_view text) {
  std::string line;
  while (!text.empty()) {
    const std::size_t control = control_bytes(text);
    for (const char c : text.substr(0, control)) {
      line += fmt::format("\\x{:02x}", static_cast<unsigned char>(c));
    }
    if (control == 0) {
      line += text.front();
    }
    text.remove_prefix(std::max<std::size_t>(1, control));
  }
  return line;
}

}  // namespace misa::cli
