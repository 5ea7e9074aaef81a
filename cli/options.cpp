#include "options.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <charconv>
#include <cstdio>
#include <limits>
#include <vector>

#include "streams.hpp"

namespace misa::cli {

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

CLI::Validator whole_number(std::int64_t least, std::int64_t most) {
  return CLI::Validator(
      [least, most](const std::string& text) -> std::string {
        std::int64_t value = 0;
        const char* end = text.data() + text.size();
        const auto [stop, error] = std::from_chars(text.data(), end, value);
        if (error == std::errc() && stop == end && value >= least && value <= most) {
          return {};
        }
        return fmt::format("expected a whole number from {} to {}, got '{}'", least, most, text);
      },
      "");
}

CLI::Validator whole_number(std::int64_t least) {
  return whole_number(least, std::numeric_limits<int>::max());
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
  for (const char c : text) {
    const auto code = static_cast<unsigned char>(c);
    constexpr unsigned char kDelete = 0x7f;
    if (code < ' ' || code == kDelete) {
      line += fmt::format("\\x{:02x}", code);
    } else {
      line += c;
    }
  }
  return line;
}

}  // namespace misa::cli
