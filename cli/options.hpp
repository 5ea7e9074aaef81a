// SPDX-License-Identifier: Apache-2.0
// Options and output that the subcommands share.
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

// --dtype, of queries and keys: the name of safetensors files, F32, BF16 or F8_E4M3. The names that
// the program prints for them, f32, bf16 and e4m3, are accepted too.
void add_dtype_option(CLI::App& command, std::string& dtype);

// Accepts whole numbers from least to most, which is the largest int by default.
CLI::Validator whole_number(std::int64_t least, std::int64_t most);
CLI::Validator whole_number(std::int64_t least);

// The same, and takes K, M or G after a number for 2^10, 2^20 or 2^30 times as many.
CLI::Validator size_number(std::int64_t least, std::int64_t most);

// Accepts these words.
CLI::Validator one_of(std::span<const std::string_view> words);

// Prints to stdout. An ordered_json keeps its members in the order in which they were added.
void print_json(const nlohmann::ordered_json& json);

// The same text with control characters escaped.
std::string one_line(std::string_view text);

}  // namespace misa::cli
