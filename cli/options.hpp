// SPDX-License-Identifier: Apache-2.0
// What the subcommands have in common.
#pragma once

#include <CLI/App.hpp>
#include <cstdint>
#include <nlohmann/json.hpp>
#include <span>
#include <string>
#include <string_view>

#include "misa/context.hpp"

namespace misa::cli {

// --backend and --threads
struct RunOptions {
  std::string backend = "auto";
  int threads = 0;
};
void add_run_options(CLI::App& command, RunOptions& options);
Context make_context(const RunOptions& options);

// --json
void add_json_option(CLI::App& command, bool& json);

// Accepts whole numbers from least to most, the largest int if it is left out.
CLI::Validator whole_number(std::int64_t least, std::int64_t most);
CLI::Validator whole_number(std::int64_t least);

// Accepts these words.
CLI::Validator one_of(std::span<const std::string_view> words);

// To stdout. A json converts to an ordered_json, which keeps its members as they were added.
void print_json(const nlohmann::ordered_json& json);

// The same text with control characters escaped.
std::string one_line(std::string_view text);

}  // namespace misa::cli
