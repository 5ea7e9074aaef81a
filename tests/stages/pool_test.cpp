// SPDX-License-Identifier: Apache-2.0
#include "pool/reference.hpp"

#include <gtest/gtest.h>

#include "rows.hpp"

namespace misa::test {
namespace {

// Sums in another order differ by at most this many roundings of double.
double tolerance(std::int64_t block) { return static_cast<double>(block) * 0x1p-50; }

TEST(SmokeBlockMeans, AreMeansOfTheVisibleKeysOfEachBlock) {
  for (const std::int64_t block : {64, 128, 1024}) {
    for (const std::int64_t n : {1, 63, 64, 65, 128, 129, 1023, 1024, 1025, 2100}) {
      const reference::Row row = random_row(n);
      const auto means = reference::block_means(row, block);
      ASSERT_EQ(std::ssize(means), (n + block - 1) / block);
      for (std::int64_t d = 0; d < row.dim; ++d) {
        std::vector<double> sum(means.size());
        std::vector<int> count(means.size());
        for (std::int64_t s = n - 1; s >= 0; --s) {
          sum[s / block] += row.key(s)[d];
          ++count[s / block];
        }
        for (std::size_t b = 0; b < means.size(); ++b) {
          ASSERT_NEAR(means[b][d], sum[b] / count[b], tolerance(block)) << n << ' ' << b;
        }
      }
    }
  }
}

TEST(SmokeBlockMeans, OfNoKeysAreNone) {
  EXPECT_TRUE(reference::block_means(random_row(0), 64).empty());
}

}  // namespace
}  // namespace misa::test
