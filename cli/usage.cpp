// SPDX-License-Identifier: Apache-2.0
#include "usage.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstddef>
#include <numeric>
#include <string_view>
#include <utility>
#include <vector>

namespace misa::cli {
namespace {

// How many characters have to be inserted, removed or replaced to turn one text into the other.
std::size_t distance(std::string_view a, std::string_view b) {
  std::vector<std::size_t> row(b.size() +
                               1);  // from the first i characters of a, to each start of b
  std::iota(row.begin(), row.end(), std::size_t{0});
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::size_t diagonal = std::exchange(row[0], i + 1);
    for (std::size_t j = 0; j < b.size(); ++j) {
      const std::size_t replaced = diagonal + (a[i] == b[j] ? 0 : 1);
      diagonal = row[j + 1];
      row[j + 1] = std::min({replaced, diagonal + 1, row[j] + 1});
    }
  }
  return row.back();
}

// ", perhaps" and the name that is most like the text, or begins with it; nothing if more than half
// of the text would have to change.
std::string perhaps(std::string_view text, const std::vector<std::string>& names) {
  const std::size_t dashes = std::min(text.find_first_not_of('-'), text.size());
  std::size_t least = (text.size() - dashes) / 2 + 1;
  std::string found;
  for (const std::string& name : names) {
    const std::size_t changes = name.starts_with(text) ? 1 : distance(text, name);
    if (changes < least) {
      least = changes;
      found = ", perhaps " + name;
    }
  }
  return found;
}

std::vector<std::string> option_names(const CLI::App& command) {
  std::vector<std::string> names;
  for (const CLI::Option* option : command.get_options()) {
    for (const std::string& name : option->get_lnames()) {
      names.push_back("--" + name);
    }
  }
  return names;
}

std::string wrong_command(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands({})) {
    names.push_back(command->get_name());
  }
  const std::vector<std::string> rest = app.remaining();
  const std::string got = rest.empty() ? "" : rest.front();
  return fmt::format("command: expected {} or --help, got {}{}", fmt::join(names, ", "),
                     rest.empty() ? "none" : "'" + got + "'",
                     perhaps(got, got.starts_with('-') ? option_names(app) : names));
}

std::string wrong_option(const CLI::App& command, std::string_view option) {
  const std::string_view name = option.substr(0, option.find('='));
  return fmt::format("{}: expected an option that `misa {} --help` lists{}", name,
                     command.get_name(), perhaps(name, option_names(command)));
}

}  // namespace

std::string usage_error(const CLI::App& app, const CLI::ParseError& error) {
  if (app.get_subcommands().empty()) {
    return wrong_command(app);
  }
  const CLI::App& command = *app.get_subcommands().front();
  if (dynamic_cast<const CLI::ValidationError*>(&error) != nullptr) {
    return error.what();
  }
  if (const std::vector<std::string> early = app.remaining(); !early.empty()) {
    return fmt::format("{}: expected after the command {}, got before it", early.front(),
                       command.get_name());
  }
  // A misspelt option is what is wrong even where the error is that the option itself is lacking.
  const std::vector<std::string> rest = command.remaining();
  const auto option = std::find_if(rest.begin(), rest.end(), [](const std::string& text) {
    return text.size() > 1 && text.front() == '-' && text != "--";
  });
  if (option != rest.end()) {
    return wrong_option(command, *option);
  }
  if (dynamic_cast<const CLI::ExtrasError*>(&error) != nullptr && !rest.empty()) {
    return fmt::format("arguments: expected those that `misa {} --help` lists, got '{}' too",
                       command.get_name(), rest.front());
  }
  return fmt::format("{}; `misa {} --help` tells more", error.what(), command.get_name());
}

}  // namespace misa::cli
