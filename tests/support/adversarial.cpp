// SPDX-License-Identifier: Apache-2.0
#include "support/adversarial.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>

namespace misa::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

template <class Value>
std::vector<float> row(std::int64_t n, const Value& value) {
  std::vector<float> scores;
  for (std::int64_t i = 0; i < n; ++i) {
    scores.push_back(value(i));
  }
  return scores;
}

// True for about the given fraction of positions, always the same ones.
bool scattered(std::int64_t i, double fraction) {
  std::mt19937_64 random(static_cast<std::uint64_t>(i));
  return std::uniform_real_distribution<double>()(random) < fraction;
}

float normal_at(std::int64_t i) {
  std::mt19937_64 random(static_cast<std::uint64_t>(i));
  return std::normal_distribution<float>()(random);
}

// Scores of 2 at `count` positions, spread over the row, and 1 at the others.
std::vector<float> tied_scores(std::int64_t n, std::int64_t count) {
  return row(n, [=](std::int64_t i) {
    return i * count / std::max<std::int64_t>(1, n) !=
                   (i + 1) * count / std::max<std::int64_t>(1, n)
               ? 2.0F
               : 1.0F;
  });
}

std::vector<float> ascending(std::int64_t n, std::int64_t /*top_k*/) {
  return row(n, [](std::int64_t i) { return static_cast<float>(i); });
}

constexpr std::array kRows{
    ScoreRow{"all_equal", [](std::int64_t n,
                             std::int64_t) { return row(n, [](std::int64_t) { return 3.0F; }); }},
    ScoreRow{"all_zero", [](std::int64_t n,
                            std::int64_t) { return row(n, [](std::int64_t) { return 0.0F; }); }},
    ScoreRow{"all_negative",
             [](std::int64_t n, std::int64_t) {
               return row(n, [](std::int64_t i) { return -1.0F - std::abs(normal_at(i)); });
             }},
    ScoreRow{"fewer_nonzeros_than_k",
             [](std::int64_t n, std::int64_t k) {
               return row(
                   n, [=](std::int64_t i) { return i % 7 == 3 && i / 7 < k - 1 ? 1.0F : 0.0F; });
             }},
    ScoreRow{"zeros_beside_negatives",
             [](std::int64_t n, std::int64_t) {
               return row(n, [](std::int64_t i) { return std::min(0.0F, normal_at(i)); });
             }},
    ScoreRow{"one_ulp_wide",
             [](std::int64_t n, std::int64_t) {
               return row(
                   n, [](std::int64_t i) { return scattered(i, 0.5) ? 1.0F + 0x1p-23F : 1.0F; });
             }},
    ScoreRow{"one_ulp_steps",
             [](std::int64_t n, std::int64_t) {
               return row(n, [](std::int64_t i) {
                 return 1.0F + static_cast<float>(i * 7919 % 16384) * 0x1p-23F;
               });
             }},
    ScoreRow{"smallest_normal_steps",
             [](std::int64_t n, std::int64_t) {
               return row(n, [](std::int64_t i) {
                 return static_cast<float>(i * 7919 % 16384) * 0x1p-126F;
               });
             }},
    // Numbers of ties near the capacity of other selectors' histograms: k, 2048 and 4096.
    ScoreRow{"ties_of_k_minus_1",
             [](std::int64_t n, std::int64_t k) { return tied_scores(n, k - 1); }},
    ScoreRow{"ties_of_k", [](std::int64_t n, std::int64_t k) { return tied_scores(n, k); }},
    ScoreRow{"ties_of_k_plus_1",
             [](std::int64_t n, std::int64_t k) { return tied_scores(n, k + 1); }},
    ScoreRow{"ties_of_2047", [](std::int64_t n, std::int64_t) { return tied_scores(n, 2047); }},
    ScoreRow{"ties_of_2049", [](std::int64_t n, std::int64_t) { return tied_scores(n, 2049); }},
    ScoreRow{"ties_of_4095", [](std::int64_t n, std::int64_t) { return tied_scores(n, 4095); }},
    ScoreRow{"ties_of_4097", [](std::int64_t n, std::int64_t) { return tied_scores(n, 4097); }},
    ScoreRow{"ascending", ascending},
    ScoreRow{"descending",
             [](std::int64_t n, std::int64_t k) {
               std::vector<float> scores = ascending(n, k);
               std::reverse(scores.begin(), scores.end());
               return scores;
             }},
    ScoreRow{"best_are_last",
             [](std::int64_t n, std::int64_t k) {
               return row(n, [=](std::int64_t i) { return i >= n - k ? 1.0F : 0.0F; });
             }},
    ScoreRow{"sawtooth",
             [](std::int64_t n, std::int64_t) {
               return row(n, [](std::int64_t i) { return static_cast<float>(i % 64); });
             }},
    ScoreRow{"every_magnitude",
             [](std::int64_t n, std::int64_t) {
               return row(n, [](std::int64_t i) {
                 return std::ldexp(normal_at(i), static_cast<int>(i * 37 % 200) - 100);
               });
             }},
    ScoreRow{"some_nan",
             [](std::int64_t n, std::int64_t) {
               return row(n,
                          [](std::int64_t i) { return scattered(i, 0.1) ? kNaN : normal_at(i); });
             },
             false},
    ScoreRow{"fewer_numbers_than_k",
             [](std::int64_t n, std::int64_t k) {
               return row(
                   n, [=](std::int64_t i) { return i % 5 == 2 && i / 5 < k - 1 ? -1.0F : kNaN; });
             },
             false},
    ScoreRow{"all_nan",
             [](std::int64_t n, std::int64_t) { return row(n, [](std::int64_t) { return kNaN; }); },
             false},
    ScoreRow{"some_infinite",
             [](std::int64_t n, std::int64_t) {
               return row(n, [](std::int64_t i) {
                 return scattered(i, 0.1) ? (i % 2 == 0 ? kInfinity : -kInfinity) : normal_at(i);
               });
             },
             false},
    ScoreRow{"all_minus_infinity",
             [](std::int64_t n, std::int64_t) {
               return row(n, [](std::int64_t) { return -kInfinity; });
             },
             false},
    ScoreRow{"infinities_and_nan",
             [](std::int64_t n, std::int64_t) {
               return row(n, [](std::int64_t i) {
                 constexpr std::array kValues{kNaN, -kInfinity, kInfinity, 0.0F};
                 return kValues[static_cast<std::size_t>(i * 7919 % 4)];
               });
             },
             false},
};

}  // namespace

std::span<const ScoreRow> adversarial_rows() { return kRows; }

Pack pack_with_scores(std::span<const float> scores, std::int64_t queries, DType k_dtype) {
  PackSpec spec;
  spec.sequences = {{std::ssize(scores), queries}};
  spec.heads = 2;
  spec.dim = 128;
  spec.q_dtype = k_dtype == DType::e4m3 ? DType::e4m3 : DType::f32;
  spec.k_dtype = k_dtype;
  spec.values = Values::zero;
  Pack pack = make_pack(spec);
  for (std::int64_t t = 0; t < queries; ++t) {
    pack.set_q(t, 0, 0, 1);
    pack.set_q(t, 1, 0, -1);
    pack.w[2 * t] = 1;
    pack.w[2 * t + 1] = -1;
  }
  for (std::int64_t position = 0; position < std::ssize(scores); ++position) {
    if (k_dtype == DType::e4m3) {
      pack.scale[0][position] = std::abs(scores[position]);
      pack.set_k(0, position, 0, std::copysign(1.0F, scores[position]));
    } else {
      pack.set_k(0, position, 0, scores[position]);
    }
  }
  return pack;
}

}  // namespace misa::test
