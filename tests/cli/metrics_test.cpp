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

// 64 heads of 128 bf16 values: a key is 256 bytes, a block mean in fp32 512.
const Shape kShape{1, 64, 128, 16384, DType::bf16, DType::bf16};

TEST(WorkOf, DsaMeetsEveryKeyWithEveryHead) {
  const Work work = work_of(IndexerConfig::dsa(1024), kShape, 16384);
  EXPECT_DOUBLE_EQ(work.dots, 16384.0 * 64);
  EXPECT_DOUBLE_EQ(work.bytes, 16384.0 * 256);
}

TEST(WorkOf, ShortRowsCostNothing) {
  const Work work = work_of(IndexerConfig::dsa(1024), kShape, 1024);
  EXPECT_DOUBLE_EQ(work.dots, 0);
  EXPECT_DOUBLE_EQ(work.bytes, 0);
}

TEST(WorkOf, MisaMeetsBlockMeansThenKeysWithItsHeads) {
  const Work work = work_of(IndexerConfig::misa(1024, 8), kShape, 16000);
  EXPECT_DOUBLE_EQ(work.dots, 16.0 * 64 + 16000.0 * 8);
  EXPECT_DOUBLE_EQ(work.bytes, 16.0 * 512 + 16000.0 * 256);
}

TEST(WorkOf, ReRankingMeetsTheCandidatesWithEveryHead) {
  const Work work = work_of(IndexerConfig::misa_dagger(1024, 8, 8192), kShape, 16384);
  EXPECT_DOUBLE_EQ(work.dots, 16.0 * 64 + 16384.0 * 8 + 8192.0 * 64);
}

TEST(WorkOf, ReRankingEverythingIsDsa) {
  const Work work = work_of(IndexerConfig::misa_dagger(1024, 8, 8192), kShape, 8192);
  EXPECT_DOUBLE_EQ(work.dots, 8192.0 * 64);
}

TEST(WorkOf, MisaRSamplesAndAddsOneRow) {
  // 16000 keys: every 128th, 125 of them.
  const Work work = work_of(IndexerConfig::misa_r(1024, 7), kShape, 16000);
  EXPECT_DOUBLE_EQ(work.dots, 125.0 * 64 + 16000.0 * 8);
}

TEST(WorkOf, AllHeadsRoutedIsDsa) {
  const Work work = work_of(IndexerConfig::misa(1024, 64), kShape, 16384);
  EXPECT_DOUBLE_EQ(work.dots, 16384.0 * 64);
}

TEST(WorkOf, AutoIsDsaUpToItsThreshold) {
  const IndexerConfig automatic = IndexerConfig::automatic(1024);
  EXPECT_DOUBLE_EQ(work_of(automatic, kShape, 8192).dots, 8192.0 * 64);
  // 8193 keys: every 128th, 65 of them.
  EXPECT_DOUBLE_EQ(work_of(automatic, kShape, 8193).dots, 65.0 * 64 + 8193.0 * 4 + 2048.0 * 64);
}

TEST(WorkOf, HisaMeetsBlockMeansThenTheKeysOfItsBlocks) {
  // 126 blocks, the last of 50 keys; 63 whole ones and the last are kept.
  const Work work = work_of(IndexerConfig::hisa(1024, 128, 64), kShape, 125 * 128 + 50);
  EXPECT_DOUBLE_EQ(work.dots, (126.0 + 63 * 128 + 50) * 64);
}

TEST(WorkOf, HisaWithFewBlocksIsDsa) {
  const Work work = work_of(IndexerConfig::hisa(1024, 128, 64), kShape, 64 * 128);
  EXPECT_DOUBLE_EQ(work.dots, 64.0 * 128 * 64);
}

TEST(WorkOf, HisaFiltersNoRowOfLittleWork) {
  IndexerConfig config = IndexerConfig::hisa(1024, 128, 64);
  config.dense_work = 64 * 16000;
  EXPECT_DOUBLE_EQ(work_of(config, kShape, 16000).dots, 16000.0 * 64);
}

TEST(WorkOf, Fp8KeysCarryAScale) {
  Shape shape = kShape;
  shape.k_dtype = DType::e4m3;
  EXPECT_DOUBLE_EQ(work_of(IndexerConfig::dsa(1024), shape, 16384).bytes, 16384.0 * (128 + 4));
}

TEST(Measure, RunsOnceMoreThanItCounts) {
  int calls = 0;
  const Timing timing = measure(4, [&] { ++calls; });
  EXPECT_EQ(calls, 5);
  EXPECT_EQ(timing.runs, 4);
  EXPECT_LE(timing.fastest, timing.median);
  EXPECT_LE(timing.median, timing.slowest);
}

}  // namespace
}  // namespace misa::cli
