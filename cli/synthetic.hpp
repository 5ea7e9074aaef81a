// SPDX-License-Identifier: Apache-2.0
// What the values of a synthetic trace are like. A value depends only on the seed and its place.
#pragma once

#include <array>
#include <cstdint>
#include <memory>
#include <random>
#include <span>
#include <string_view>

namespace misa::cli {

inline constexpr std::array<std::string_view, 4> kSyntheticKinds{"random", "structured",
                                                                 "concentrated", "passages"};

struct SyntheticShape {
  std::int64_t keys;  // of a sequence
  std::int64_t heads;
  std::int64_t dim;
  std::uint64_t seed;
};

/// The values of a trace in fp32, row by row; rows count over all sequences.
class Synthetic {
 public:
  virtual ~Synthetic() = default;
  /// q of query t, [H, D]
  virtual void query(std::int64_t t, std::span<float> out) const = 0;
  /// w of query t, [H], with H^-1/2 D^-1/2 folded in
  virtual void weights(std::int64_t t, std::span<float> out) const = 0;
  /// key s, [D]
  virtual void key(std::int64_t s, std::span<float> out) const = 0;
};

/// `kind` is one of kSyntheticKinds.
std::unique_ptr<const Synthetic> make_synthetic(std::string_view kind, const SyntheticShape& shape);

/// What random numbers are used for.
enum class SyntheticUse : std::uint32_t { directions, queries, weights, keys, pages };

/// The generator for one row of one use.
std::mt19937_64 synthetic_numbers(std::uint64_t seed, SyntheticUse use, std::int64_t row);

}  // namespace misa::cli
