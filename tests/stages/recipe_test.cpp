// SPDX-License-Identifier: Apache-2.0
// The recipe: what a configuration means for a row, as a table, and what it costs.
#include "core/recipe.hpp"

#include <gtest/gtest.h>

#include <ostream>
#include <string>
#include <vector>

namespace misa {

bool operator==(const Recipe& a, const Recipe& b) {
  return a.dense == b.dense && a.routed == b.routed && a.sampled == b.sampled &&
         a.filtered == b.filtered && a.active == b.active && a.residual == b.residual &&
         a.sketched == b.sketched && a.reranked == b.reranked && a.heads == b.heads &&
         a.scored == b.scored && a.keep == b.keep;
}

void PrintTo(const Recipe& recipe, std::ostream* out) {
  const auto flag = [&](bool set, const char* name) { *out << (set ? name : ""); };
  flag(recipe.dense, "dense ");
  flag(recipe.routed, "routed ");
  flag(recipe.sampled, "sampled ");
  flag(recipe.filtered, "filtered ");
  flag(recipe.active, "active ");
  flag(recipe.residual, "residual ");
  flag(recipe.sketched, "sketched ");
  flag(recipe.reranked, "reranked ");
  *out << recipe.heads << " heads score " << recipe.scored << " keys, " << recipe.keep << " kept";
}

namespace test {
namespace {

constexpr std::int64_t kHeads = 64;

struct Case {
  std::string name;
  IndexerConfig config;
  std::int64_t n;
  Recipe row;      // of n keys
  Recipe largest;  // of up to n keys
};

IndexerConfig filtered(IndexerConfig config, int block, int blocks) {
  config.filter_block = block;
  config.filter_blocks = blocks;
  return config;
}

IndexerConfig dense_up_to(IndexerConfig config, std::int64_t keys) {
  config.dense_work = keys * kHeads;
  return config;
}

IndexerConfig sketched(IndexerConfig config, int sketch) {
  config.sketch = sketch;
  return config;
}

std::vector<Case> cases() {
  // dense, routed, sampled, filtered, active, residual, sketched, reranked; heads, keys scored,
  // kept
  const auto same = [](std::string name, IndexerConfig config, std::int64_t n, Recipe recipe) {
    return Case{std::move(name), std::move(config), n, recipe, recipe};
  };
  const IndexerConfig dsa = IndexerConfig::dsa(100);
  const IndexerConfig misa = IndexerConfig::misa(100, 8);
  const IndexerConfig dagger = IndexerConfig::misa_dagger(100, 8, 400);
  const IndexerConfig misa_r = IndexerConfig::misa_r(100, 7);
  const IndexerConfig hisa = IndexerConfig::hisa(100, 64, 4);
  IndexerConfig every = IndexerConfig::misa_r(100, 64, 400);
  IndexerConfig unrouted = dsa;
  unrouted.candidates = 150;
  return {
      same("dsa", dsa, 1000, {0, 0, 0, 0, 0, 0, 0, 0, 64, 1000, 100}),
      same("empty row", misa, 0, {1, 0, 0, 0, 0, 0, 0, 0, 64, 0, 100}),
      same("pooled", misa, 1000, {0, 1, 0, 0, 1, 0, 0, 0, 8, 1000, 100}),
      same("no more keys than wanted", misa, 50, {0, 1, 0, 0, 1, 0, 0, 0, 8, 50, 100}),
      same("residual", misa_r, 1000, {0, 1, 1, 0, 1, 1, 0, 0, 7, 1000, 100}),
      same("re-rank", dagger, 401, {0, 1, 0, 0, 1, 0, 0, 1, 8, 401, 400}),
      same("every key a candidate", dagger, 400, {0, 1, 0, 0, 0, 0, 0, 0, 64, 400, 100}),
      same("every head routed", every, 1000, {0, 1, 1, 0, 0, 0, 0, 0, 64, 1000, 100}),
      same("as many blocks as are kept", hisa, 256, {0, 0, 0, 0, 0, 0, 0, 0, 64, 256, 100}),
      {"one block more, of one key",
       hisa,
       257,
       {0, 0, 0, 1, 0, 0, 0, 0, 64, 193, 100},
       {0, 0, 0, 1, 0, 0, 0, 0, 64, 256, 100}},
      {"a last block that is whole",
       hisa,
       640,
       {0, 0, 0, 1, 0, 0, 0, 0, 64, 256, 100},
       {0, 0, 0, 1, 0, 0, 0, 0, 64, 256, 100}},
      // Rows of 201 to 256 keys are re-ranked; those of 257 to 264 have fewer keys in their blocks.
      {"candidates between a short and a whole last block",
       filtered(IndexerConfig::misa_dagger(100, 8, 200), 64, 4),
       257,
       {0, 1, 0, 1, 0, 0, 0, 0, 64, 193, 100},
       {0, 1, 0, 1, 1, 0, 0, 1, 8, 256, 200}},
      same("a sketch of routed rows", sketched(IndexerConfig::misa_r(100, 3, 400), 2), 401,
           {0, 1, 1, 0, 1, 1, 1, 1, 3, 401, 400}),
      same("a sketch, every key a candidate", sketched(IndexerConfig::misa_r(100, 3, 400), 2), 400,
           {0, 1, 1, 0, 0, 0, 0, 0, 64, 400, 100}),
      same("a sketch for every head", sketched(unrouted, 4), 1000,
           {0, 0, 0, 0, 0, 0, 1, 1, 64, 1000, 150}),
      same("a sketch for every head, every key a candidate", sketched(unrouted, 4), 150,
           {0, 0, 0, 0, 0, 0, 0, 0, 64, 150, 100}),
      same("a re-rank for every head, no sketch", unrouted, 1000,
           {0, 0, 0, 0, 0, 0, 0, 0, 64, 1000, 100}),
      same("a sketch, every head routed", sketched(every, 2), 1000,
           {0, 1, 1, 0, 0, 0, 0, 0, 64, 1000, 100}),
      {"a sketch behind the block filter",
       filtered(sketched(unrouted, 2), 64, 4),
       640,
       {0, 0, 0, 1, 0, 0, 1, 1, 64, 256, 150},
       {0, 0, 0, 1, 0, 0, 1, 1, 64, 256, 150}},
      same("little work needs no sketch", dense_up_to(sketched(unrouted, 4), 1000), 1000,
           {1, 0, 0, 0, 0, 0, 0, 0, 64, 1000, 100}),
      same("little work", dense_up_to(misa_r, 1000), 1000, {1, 0, 0, 0, 0, 0, 0, 0, 64, 1000, 100}),
      same("a key beyond", dense_up_to(misa_r, 1000), 1001, {0, 1, 1, 0, 1, 1, 0, 0, 7, 1001, 100}),
      same("little work is not filtered", dense_up_to(hisa, 1000), 1000,
           {1, 0, 0, 0, 0, 0, 0, 0, 64, 1000, 100}),
  };
}

TEST(Recipe, IsThatOfTheTable) {
  for (const Case& each : cases()) {
    EXPECT_EQ(recipe_of(each.config, kHeads, each.n), each.row) << each.name;
    EXPECT_EQ(largest_recipe(each.config, kHeads, each.n), each.largest) << each.name;
  }
}

// No row takes what the largest one of its plan does not.
TEST(Recipe, LargestCoversEveryRow) {
  for (const Case& each : cases()) {
    const Recipe largest = largest_recipe(each.config, kHeads, each.n);
    for (std::int64_t n = 0; n <= each.n; ++n) {
      const Recipe row = recipe_of(each.config, kHeads, n);
      EXPECT_LE(row.routed, largest.routed) << each.name << ", " << n;
      EXPECT_LE(row.sampled, largest.sampled) << each.name << ", " << n;
      EXPECT_LE(row.filtered, largest.filtered) << each.name << ", " << n;
      EXPECT_LE(row.active, largest.active) << each.name << ", " << n;
      EXPECT_LE(row.residual, largest.residual) << each.name << ", " << n;
      EXPECT_LE(row.sketched, largest.sketched) << each.name << ", " << n;
      EXPECT_LE(row.reranked, largest.reranked) << each.name << ", " << n;
      EXPECT_LE(row.scored, largest.scored) << each.name << ", " << n;
      EXPECT_LE(row.keep, largest.keep) << each.name << ", " << n;
    }
  }
}

// 64 heads of 128 bf16 values: a key is 256 bytes, a block mean in fp32 512.
const Shape kShape{1, 64, 128, 16384, DType::bf16, DType::bf16};

TEST(CostOf, DsaMeetsEveryKeyWithEveryHead) {
  const Cost cost = cost_of(IndexerConfig::dsa(1024), kShape, 16384);
  EXPECT_DOUBLE_EQ(cost.dots, 16384.0 * 64);
  EXPECT_DOUBLE_EQ(cost.bytes, 16384.0 * 256);
}

TEST(CostOf, ShortRowsCostNothing) {
  const Cost cost = cost_of(IndexerConfig::dsa(1024), kShape, 1024);
  EXPECT_DOUBLE_EQ(cost.dots, 0);
  EXPECT_DOUBLE_EQ(cost.bytes, 0);
}

TEST(CostOf, MisaMeetsBlockMeansThenKeysWithItsHeads) {
  const Cost cost = cost_of(IndexerConfig::misa(1024, 8), kShape, 16000);
  EXPECT_DOUBLE_EQ(cost.dots, 16.0 * 64 + 16000.0 * 8);
  EXPECT_DOUBLE_EQ(cost.bytes, 16.0 * 512 + 16000.0 * 256);
}

TEST(CostOf, ReRankingMeetsTheCandidatesWithEveryHead) {
  const Cost cost = cost_of(IndexerConfig::misa_dagger(1024, 8, 8192), kShape, 16384);
  EXPECT_DOUBLE_EQ(cost.dots, 16.0 * 64 + 16384.0 * 8 + 8192.0 * 64);
}

TEST(CostOf, ReRankingEverythingIsDsa) {
  const Cost cost = cost_of(IndexerConfig::misa_dagger(1024, 8, 8192), kShape, 8192);
  EXPECT_DOUBLE_EQ(cost.dots, 8192.0 * 64);
}

TEST(CostOf, MisaRSamplesAndAddsOneRow) {
  // 16000 keys: every 128th, 125 of them.
  const Cost cost = cost_of(IndexerConfig::misa_r(1024, 7), kShape, 16000);
  EXPECT_DOUBLE_EQ(cost.dots, 125.0 * 64 + 16000.0 * 8);
}

TEST(CostOf, AllHeadsRoutedIsDsa) {
  const Cost cost = cost_of(IndexerConfig::misa(1024, 64), kShape, 16384);
  EXPECT_DOUBLE_EQ(cost.dots, 16384.0 * 64);
}

TEST(CostOf, AutoIsDsaUpToItsThreshold) {
  const IndexerConfig automatic = IndexerConfig::automatic(1024);
  EXPECT_DOUBLE_EQ(cost_of(automatic, kShape, 8192).dots, 8192.0 * 64);
  // 8193 keys: every 128th, 65 of them.
  EXPECT_DOUBLE_EQ(cost_of(automatic, kShape, 8193).dots, 65.0 * 64 + 8193.0 * 4 + 2048.0 * 64);
}

TEST(CostOf, HisaMeetsBlockMeansThenTheKeysOfItsBlocks) {
  // 126 blocks, the last of 50 keys; 63 whole ones and the last are kept.
  const Cost cost = cost_of(IndexerConfig::hisa(1024, 128, 64), kShape, 125 * 128 + 50);
  EXPECT_DOUBLE_EQ(cost.dots, (126.0 + 63 * 128 + 50) * 64);
}

TEST(CostOf, HisaWithFewBlocksIsDsa) {
  const Cost cost = cost_of(IndexerConfig::hisa(1024, 128, 64), kShape, 64 * 128);
  EXPECT_DOUBLE_EQ(cost.dots, 64.0 * 128 * 64);
}

TEST(CostOf, HisaFiltersNoRowOfLittleWork) {
  IndexerConfig config = IndexerConfig::hisa(1024, 128, 64);
  config.dense_work = 64 * 16000;
  EXPECT_DOUBLE_EQ(cost_of(config, kShape, 16000).dots, 16000.0 * 64);
}

TEST(CostOf, Fp8KeysCarryAScale) {
  Shape shape = kShape;
  shape.k_dtype = DType::e4m3;
  EXPECT_DOUBLE_EQ(cost_of(IndexerConfig::dsa(1024), shape, 16384).bytes, 16384.0 * (128 + 4));
}

TEST(CostOf, ASketchHasAQuarterOrHalfOfTheBytes) {
  Shape shape = kShape;
  shape.k_dtype = DType::e4m3;
  IndexerConfig config = IndexerConfig::dsa(1024);
  config.candidates = 2048;
  config.sketch = 2;
  EXPECT_DOUBLE_EQ(cost_of(config, shape, 16384).bytes, 16384.0 * 34 + 2048.0 * 132);
  config.sketch = 4;
  EXPECT_DOUBLE_EQ(cost_of(config, shape, 16384).bytes, 16384.0 * 68 + 2048.0 * 132);
  EXPECT_DOUBLE_EQ(cost_of(config, shape, 16384).dots, 18432.0 * 64);
}

}  // namespace
}  // namespace test
}  // namespace misa
