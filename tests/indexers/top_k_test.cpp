// SPDX-License-Identifier: Apache-2.0
// Selection on rows on which other selectors failed. Scores are exact (adversarial.hpp), and so is
// the expected row.
#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "common.hpp"
#include "support/adversarial.hpp"

namespace misa::test {
namespace {

// The k best positions of a row, ascending, by sorting it.
std::vector<std::int32_t> by_sorting(const std::vector<float>& scores, std::int64_t k) {
  std::vector<std::int32_t> order(scores.size());
  std::iota(order.begin(), order.end(), 0);
  std::sort(order.begin(), order.end(), [&](std::int32_t i, std::int32_t j) {
    const bool i_nan = std::isnan(scores[i]);
    const bool j_nan = std::isnan(scores[j]);
    if (i_nan != j_nan) {
      return j_nan;
    }
    return i_nan || scores[i] == scores[j] ? i < j : scores[i] > scores[j];
  });
  order.resize(std::min(order.size(), static_cast<std::size_t>(k)));
  std::sort(order.begin(), order.end());
  return order;
}

// Configurations that select on different paths without changing the scores.
std::vector<NamedConfig> paths(int top_k) {
  IndexerConfig routed = IndexerConfig::misa(top_k, 2);
  routed.router = Router::weight;
  IndexerConfig re_ranked = routed;
  re_ranked.candidates = 3 * top_k;
  return {{"dsa", IndexerConfig::dsa(top_k)}, {"routed", routed}, {"re-ranked", re_ranked}};
}

class TopK : public EachBackend {
 protected:
  // Checks rows of n - 1 and n scores.
  void check(const ScoreRow& row, std::int64_t n, int top_k, DType k_dtype) const {
    std::vector<float> scores = row.make(n, top_k);
    if (k_dtype == DType::bf16) {
      std::transform(scores.begin(), scores.end(), scores.begin(),
                     [](float score) { return bf16_to_float(float_to_bf16(score)); });
    }
    const RaggedInputs inputs(pack_with_scores(scores, 2, k_dtype));
    for (const NamedConfig& named : paths(top_k)) {
      const Selected result = run(context(), named.config, inputs);
      const auto what = std::string(row.name) + ", n = " + std::to_string(n) +
                        ", k = " + std::to_string(top_k) + ", " + named.name + ", " +
                        name_of(k_dtype);
      for (const std::int64_t t : {0, 1}) {
        const std::vector<float> seen(scores.begin(), scores.end() - 1 + t);
        const auto wanted = by_sorting(seen, top_k);
        for (std::size_t i = 0; i < static_cast<std::size_t>(top_k); ++i) {
          const std::size_t at = static_cast<std::size_t>(t * top_k) + i;
          const std::int32_t position = i < wanted.size() ? wanted[i] : -1;
          ASSERT_EQ(result.indices[at], position) << what << ", row " << t << ", entry " << i;
          const float score =
              position < 0 ? -std::numeric_limits<float>::infinity() : seen[position];
          if (std::isnan(score)) {
            ASSERT_TRUE(std::isnan(result.scores[at])) << what << ", entry " << i;
          } else {
            ASSERT_EQ(result.scores[at], score) << what << ", entry " << i;
          }
        }
      }
    }
  }
};

TEST_P(TopK, SmokeShortAndLongRows) {
  for (const ScoreRow& row : adversarial_rows()) {
    for (const std::int64_t n : {1, 31, 32, 33, 64, 65, 700}) {
      check(row, n, 32, DType::f32);
    }
  }
}

TEST_P(TopK, LargeK) {
  for (const ScoreRow& row : adversarial_rows()) {
    for (const std::int64_t n : {2047, 2048, 2049, 9000}) {
      check(row, n, 2048, DType::f32);
    }
  }
}

TEST_P(TopK, KOfOne) {
  for (const ScoreRow& row : adversarial_rows()) {
    check(row, 5000, 1, DType::f32);
  }
}

TEST_P(TopK, LongRows) {
  for (const ScoreRow& row : adversarial_rows()) {
    check(row, 40000, 512, DType::f32);
  }
}

TEST_P(TopK, Bf16Keys) {
  for (const ScoreRow& row : adversarial_rows()) {
    check(row, 5000, 512, DType::bf16);
  }
}

// An infinite scale times an element of zero is NaN, so e4m3 keys can only have finite scores.
TEST_P(TopK, E4m3Keys) {
  for (const ScoreRow& row : adversarial_rows()) {
    if (row.finite) {
      check(row, 5000, 512, DType::e4m3);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Each, TopK, ::testing::ValuesIn(available_backends()), backend_name);

}  // namespace
}  // namespace misa::test
