// SPDX-License-Identifier: Apache-2.0
#include "select/reference.hpp"

#include <gtest/gtest.h>

#include <cmath>

#include "support/adversarial.hpp"

namespace misa::test {
namespace {

// The specification, literally: a value is selected if fewer than k rank above it.
std::vector<std::int64_t> by_counting(const std::vector<double>& values, std::int64_t k) {
  const auto above = [&](std::int64_t i, std::int64_t j) {
    if (std::isnan(values[i]) || std::isnan(values[j])) {
      return std::isnan(values[i]) == std::isnan(values[j]) ? i < j : std::isnan(values[j]);
    }
    return values[i] > values[j] || (values[i] == values[j] && i < j);
  };
  std::vector<std::int64_t> selected;
  for (std::int64_t i = 0; i < std::ssize(values); ++i) {
    std::int64_t count = 0;
    for (std::int64_t j = 0; j < std::ssize(values); ++j) {
      count += j != i && above(j, i) ? 1 : 0;
    }
    if (count < k) {
      selected.push_back(i);
    }
  }
  return selected;
}

TEST(SmokeTopK, FollowsTheRuleOnAdversarialRows) {
  for (const ScoreRow& row : adversarial_rows()) {
    for (const std::int64_t n : {0, 1, 15, 16, 17, 300}) {
      const std::vector<float> scores = row.make(n, 16);
      const std::vector<double> values(scores.begin(), scores.end());
      EXPECT_EQ(reference::top_k(values, 16), by_counting(values, 16)) << row.name << ' ' << n;
    }
  }
}

TEST(SmokeTopK, HoldsZerosOfBothSignsEqual) {
  EXPECT_EQ(reference::top_k(std::vector<double>{-0.0, 0.0, -0.0}, 1),
            std::vector<std::int64_t>{0});
}

// Every row must be finite where it says so: other tests rely on it.
TEST(SmokeAdversarialRows, AreFiniteWhereTheySay) {
  for (const ScoreRow& row : adversarial_rows()) {
    bool finite = true;
    for (const float score : row.make(5000, 512)) {
      finite = finite && std::isfinite(score);
    }
    EXPECT_EQ(finite, row.finite) << row.name;
  }
}

}  // namespace
}  // namespace misa::test
