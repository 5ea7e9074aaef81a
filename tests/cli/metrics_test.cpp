// SPDX-License-Identifier: Apache-2.0
// The figures of `compare`, on cases small enough to work out by hand.
#include "metrics.hpp"

#include <gtest/gtest.h>

#include <array>
#include <cstdint>
#include <vector>

namespace misa::cli {
namespace {

using Row = std::vector<std::int32_t>;

TEST(Recall, IsTheShareOfTheWantedPositions) {
  EXPECT_DOUBLE_EQ(recall(Row{1, 2, 3, 4}, Row{1, 2, 3, 4}), 1.0);
  EXPECT_DOUBLE_EQ(recall(Row{1, 2, 3, 4}, Row{3, 4, 5, 6}), 0.5);
  EXPECT_DOUBLE_EQ(recall(Row{1, 2}, Row{3, 4}), 0.0);
}

TEST(Recall, DoesNotDependOnOrder) {
  EXPECT_DOUBLE_EQ(recall(Row{9, 0, 7, 3}, Row{3, 8, 9, 1}), 0.5);
}

TEST(Recall, LeavesPaddingOut) {
  EXPECT_DOUBLE_EQ(recall(Row{5, -1, -1}, Row{5, 6, -1}), 0.5);
  EXPECT_DOUBLE_EQ(recall(Row{-1, -1}, Row{-1, -1}), 1.0);
}

TEST(AttentionMass, IsTheShareOnTheSelectedPositions) {
  const std::array attention{0.5F, 0.25F, 0.125F, 0.125F};
  EXPECT_DOUBLE_EQ(attention_mass(Row{0, 3}, attention), 0.625);
  EXPECT_DOUBLE_EQ(attention_mass(Row{1, -1, -1}, attention), 0.25);
  EXPECT_DOUBLE_EQ(attention_mass(Row{0, 1, 2, 3}, attention), 1.0);
}

TEST(AttentionMass, IsRelativeToTheRow) {
  const std::array attention{2.0F, 6.0F};
  EXPECT_DOUBLE_EQ(attention_mass(Row{1}, attention), 0.75);
  EXPECT_DOUBLE_EQ(attention_mass(Row{1}, std::array{0.0F, 0.0F}), 0.0);
}

TEST(BestAttentionMass, TakesTheLargestWeights) {
  const std::array attention{0.125F, 0.5F, 0.125F, 0.25F};
  EXPECT_DOUBLE_EQ(best_attention_mass(attention, 2), 0.75);
  EXPECT_DOUBLE_EQ(best_attention_mass(attention, 9), 1.0);
}

TEST(Quantile, IsLinearBetweenOrderStatistics) {
  EXPECT_DOUBLE_EQ(quantile({4, 1, 3, 2}, 0.0), 1.0);
  EXPECT_DOUBLE_EQ(quantile({4, 1, 3, 2}, 1.0), 4.0);
  EXPECT_DOUBLE_EQ(quantile({4, 1, 3, 2}, 0.5), 2.5);
  EXPECT_DOUBLE_EQ(quantile({7}, 0.05), 7.0);
}

TEST(Summary, HoldsMeanLowQuantileAndMinimum) {
  std::vector<double> values;
  for (int i = 0; i <= 20; ++i) {
    values.push_back(i);
  }
  const Summary summary = summarize(values);
  EXPECT_DOUBLE_EQ(summary.mean, 10);
  EXPECT_DOUBLE_EQ(summary.low, 1);  // the second of 21
  EXPECT_DOUBLE_EQ(summary.min, 0);
}

}  // namespace
}  // namespace misa::cli
