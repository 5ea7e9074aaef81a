// SPDX-License-Identifier: Apache-2.0
// The routers of the reference against formulas written another way.
#include "route/reference.hpp"

#include <gmock/gmock.h>

#include <cmath>
#include <numeric>

#include "core/recipe.hpp"
#include "pool/reference.hpp"
#include "rows.hpp"

namespace misa::test {
namespace {

using ::testing::ElementsAre;

// Double precision leaves at least this many digits where the two formulas cancel differently.
constexpr double kTolerance = 1e-9;

std::vector<double> dots(const reference::Row& row, std::int64_t j,
                         const std::vector<std::int64_t>& positions) {
  std::vector<double> x;
  for (const std::int64_t s : positions) {
    x.push_back(
        std::inner_product(row.query(j).begin(), row.query(j).end(), row.key(s).begin(), 0.0));
  }
  return x;
}

TEST(SmokeSample, IsAGridOf64To128Positions) {
  EXPECT_TRUE(reference::sample_positions(0).empty());
  for (std::int64_t n = 1; n <= 3000; ++n) {
    const auto positions = reference::sample_positions(n);
    ASSERT_EQ(positions.front(), 0);
    ASSERT_LT(positions.back(), n);
    if (n <= 128) {
      ASSERT_EQ(std::ssize(positions), n);
      continue;
    }
    const std::int64_t stride = positions[1];
    ASSERT_EQ(stride & (stride - 1), 0) << "a power of two";
    ASSERT_GE(positions.back() + stride, n) << "reaches the end";
    ASSERT_GE(std::ssize(positions), 64);
    ASSERT_LE(std::ssize(positions), 128);
    for (std::size_t i = 1; i < positions.size(); ++i) {
      ASSERT_EQ(positions[i], positions[i - 1] + stride);
    }
  }
}

TEST(SmokeFit, SolvesTheNormalEquations) {
  for (std::uint64_t seed = 1; seed <= 20; ++seed) {
    const reference::Row row = random_row(200, 1, seed);
    const auto x = dots(row, 0, reference::sample_positions(200));
    const auto n = static_cast<double>(x.size());
    double sx = 0, sr = 0, sxx = 0, sxr = 0;
    for (const double value : x) {
      const double r = std::max(0.0, value);
      sx += value;
      sr += r;
      sxx += value * value;
      sxr += value * r;
    }
    const double slope = (n * sxr - sx * sr) / (n * sxx - sx * sx);
    const double intercept = (sr - slope * sx) / n;
    double squares = 0;
    for (const double value : x) {
      squares += std::pow(std::max(0.0, value) - intercept - slope * value, 2);
    }
    const reference::Fit fit = reference::fit_relu(x);
    EXPECT_NEAR(fit.slope, slope, kTolerance);
    EXPECT_NEAR(fit.intercept, intercept, kTolerance);
    EXPECT_NEAR(fit.rms, std::sqrt(squares / n), kTolerance);
  }
}

TEST(SmokeFit, OfOneSignIsExact) {
  const std::vector<double> positive{1, 2, 5};
  EXPECT_EQ(reference::fit_relu(positive).slope, 1);
  EXPECT_NEAR(reference::fit_relu(positive).rms, 0, kTolerance);
  const std::vector<double> negative{-1, -2, -5};
  EXPECT_EQ(reference::fit_relu(negative).slope, 0);
  EXPECT_EQ(reference::fit_relu(negative).intercept, 0);
  EXPECT_EQ(reference::fit_relu(negative).rms, 0);
}

TEST(SmokeFit, WithoutVarianceHasNoSlope) {
  for (const double value : {-3.0, 0.0, 0.1}) {
    const reference::Fit fit = reference::fit_relu(std::vector<double>(7, value));
    EXPECT_EQ(fit.slope, 0);
    EXPECT_DOUBLE_EQ(fit.intercept, std::max(0.0, value));
    EXPECT_EQ(fit.rms, 0);
  }
}

TEST(SmokeRouters, MatchTheirFormulas) {
  for (const std::int64_t n : {1, 2, 100, 128, 129, 1500}) {
    const reference::Row row = random_row(n);
    const auto positions = reference::sample_positions(n);
    const auto means = reference::block_means(row, 128);
    double kappa = 0;
    for (const std::int64_t s : positions) {
      for (const double entry : row.key(s)) {
        kappa += entry * entry / static_cast<double>(std::ssize(positions) * row.dim);
      }
    }
    kappa = std::sqrt(kappa);
    for (std::int64_t j = 0; j < row.heads; ++j) {
      const double w = std::abs(row.w[j]);
      const double norm = std::sqrt(reference::dot(row.query(j), row.query(j)));
      EXPECT_EQ(reference::weight_magnitude(row)[j], w);
      EXPECT_NEAR(reference::query_norm(row)[j], norm, kTolerance);

      double energy = 0;
      for (const auto& mean : means) {
        energy += w * std::max(0.0, reference::dot(row.query(j), mean));
      }
      EXPECT_NEAR(reference::pooled_energy(row, means)[j],
                  energy / static_cast<double>(means.size()), kTolerance);

      EXPECT_NEAR(reference::self_score(row)[j],
                  row.w[j] * std::max(0.0, reference::dot(row.query(j), row.key(n - 1))),
                  kTolerance);

      const auto x = dots(row, j, positions);
      double sum = 0, squares = 0;
      for (const double value : x) {
        sum += std::max(0.0, value) / static_cast<double>(x.size());
        squares += std::pow(std::max(0.0, value), 2) / static_cast<double>(x.size());
      }
      // Differences of squares keep half of the digits.
      EXPECT_NEAR(reference::dispersion(row)[j], w * std::sqrt(std::max(0.0, squares - sum * sum)),
                  1e-6);

      const reference::Fit fit = reference::fit_relu(x);
      EXPECT_NEAR(reference::nonlinearity(row)[j],
                  w * (fit.rms + double{kFireChance} * norm * kappa * (1 - fit.slope)), kTolerance);
    }
  }
}

TEST(SmokeResidual, SumsTheHeadsThatAreNotRouted) {
  const reference::Row row = random_row(300);
  const auto positions = reference::sample_positions(300);
  const std::vector<float> residual = reference::residual_row(row, std::vector<std::int32_t>{1, 3});
  for (std::int64_t d = 0; d < row.dim; ++d) {
    double wanted = 0;
    for (const std::int64_t j : {0, 2}) {
      wanted += row.w[j] * reference::fit_relu(dots(row, j, positions)).slope * row.query(j)[d];
    }
    EXPECT_FLOAT_EQ(residual[d], static_cast<float>(wanted));
  }
}

TEST(SmokeResidual, OfEveryHeadRoutedIsZero) {
  EXPECT_THAT(reference::residual_row(random_row(10), std::vector<std::int32_t>{0, 1, 2, 3}),
              ::testing::Each(0.0F));
}

TEST(SmokeResidual, IsRoundedToE4m3OnlyForE4m3Keys) {
  const std::vector<float> residual{448, 17, -0.3F, 0};
  EXPECT_THAT(reference::rounded_residual(residual, DType::bf16), ElementsAre(448, 17, -0.3F, 0));
  EXPECT_THAT(reference::rounded_residual(residual, DType::e4m3), ElementsAre(448, 16, -0.3125, 0));
  const std::vector<float> halved{224, 8.5F, -0.15F, 0};
  EXPECT_THAT(reference::rounded_residual(halved, DType::e4m3), ElementsAre(224, 8, -0.15625, 0));
  EXPECT_THAT(reference::rounded_residual(std::vector<float>{0, 0}, DType::e4m3),
              ElementsAre(0, 0));
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_THAT(reference::rounded_residual(std::vector<float>{0.3F, kInfinity}, DType::e4m3),
              ElementsAre(0.3F, kInfinity));
}

}  // namespace
}  // namespace misa::test
