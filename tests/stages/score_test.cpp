// SPDX-License-Identifier: Apache-2.0
#include "score/reference.hpp"

#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "rows.hpp"

namespace misa::test {
namespace {

using Heads = std::vector<std::int32_t>;

TEST(SmokeScore, IsTheWeightedSumOfReLU) {
  reference::Row row;
  row.heads = 3;
  row.dim = 2;
  row.length = 1;
  row.q = {1, 0, 0, 1, 1, 1};
  row.w = {2, -3, 5};
  row.k = {3, -4};
  EXPECT_EQ(reference::score(row, row.key(0), Heads{0, 1, 2}), 6);  // 2*3 - 3*0 + 5*0
  EXPECT_EQ(reference::score(row, row.key(0), Heads{1}), 0);
  row.k = {3, 4};
  EXPECT_EQ(reference::score(row, row.key(0), Heads{0, 1, 2}), 29);  // 2*3 - 3*4 + 5*7
  EXPECT_EQ(reference::score(row, row.key(0), Heads{0, 2}), 41);
  EXPECT_EQ(reference::score(row, row.key(0), {}), 0);
  const std::vector<double> residual{-10, 1};
  EXPECT_EQ(reference::score(row, row.key(0), Heads{0}, residual), -20);  // no ReLU: 6 - 30 + 4
}

TEST(SmokeScore, KeepsNaN) {
  reference::Row row = random_row(1);
  row.k[5] = std::numeric_limits<double>::quiet_NaN();
  EXPECT_TRUE(std::isnan(reference::score(row, row.key(0), Heads{2})));
}

}  // namespace
}  // namespace misa::test
