// SPDX-License-Identifier: Apache-2.0
// Indexers in the arguments of `compare` and `bench`, e.g. misa-r:h=3:m=2k (core/notation.hpp).
#pragma once

#include <fmt/format.h>

#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

#include "misa/error.hpp"
#include "misa/indexer.hpp"

namespace misa::cli {

struct Variant {
  std::string name;   // as the user wrote it
  std::string label;  // as tables and plots show it, e.g. "MISA-R 3+1 m=2048"
  IndexerConfig config;
  bool given = true;  // by the user, not one of the default_variants
};

// The notation, for --help.
inline constexpr std::string_view kVariantHelp =
    "NAME is dsa, misa, misa-dagger, misa-r, hisa or auto; any of :h=HEADS :m=CANDIDATES "
    ":sketch=BITS :dense=WORK :B=BLOCK :blocks=N :router=ROUTER may follow it; m=2k means twice "
    "top-k; before the re-rank scores come from a sketch of BITS (2 or 4) an element of the keys, "
    "which are F8_E4M3, and m is 8k for 2 bits and 2k for 4 unless given; a query of at most WORK "
    "heads x keys is dsa's";

// Throw Error for an unknown name, setting or value.
Variant parse_variant(std::string_view text, int top_k);
std::vector<Variant> parse_variants(const std::vector<std::string>& texts, int top_k);

// Every setting of a configuration, under the names that it has in the Python package.
nlohmann::ordered_json settings_of(const IndexerConfig& config);

// Runs body and adds the variant's name to the message of its Error.
template <class Body>
void about(const Variant& variant, const Body& body) {
  try {
    body();
  } catch (const Error& error) {
    throw Error(error.code(), variant.given
                                  ? fmt::format("--indexers {}: {}", variant.name, error.what())
                                  : fmt::format("{} (by default; --indexers names others): {}",
                                                variant.name, error.what()));
  }
}

// The six indexers, and MISA-R with three heads re-ranking 2 and 4 times top-k.
const std::vector<std::string>& default_variants();

}  // namespace misa::cli
