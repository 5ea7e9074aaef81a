// SPDX-License-Identifier: Apache-2.0
// The named indexers, and the names of enumerators.
#include <gmock/gmock.h>

#include <limits>

#include "misa/error.hpp"
#include "misa/indexer.hpp"

namespace misa {
namespace {

using ::testing::ElementsAre;

template <class Call>
std::string message_of(const Call& call) {
  try {
    call();
  } catch (const Error& error) {
    EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
    return error.what();
  }
  ADD_FAILURE() << "expected an error";
  return "";
}

TEST(Config, IndexersAreNamedPoints) {
  EXPECT_THAT(indexer_names(), ElementsAre("dsa", "misa", "misa-dagger", "misa-r", "hisa", "auto"));

  const IndexerConfig dsa = indexer_by_name("dsa");
  EXPECT_EQ(dsa.router, Router::all);
  EXPECT_EQ(dsa.filter_block, 0);
  EXPECT_EQ(dsa.candidates, 0);
  EXPECT_EQ(dsa.sketch, 0);

  const IndexerConfig misa = indexer_by_name("misa");
  EXPECT_EQ(misa.router, Router::pooled);
  EXPECT_EQ(misa.heads, 8);
  EXPECT_EQ(misa.block, 1024);
  EXPECT_EQ(misa.candidates, 0);

  const IndexerConfig dagger = indexer_by_name("misa-dagger");
  EXPECT_EQ(dagger.router, Router::pooled);
  EXPECT_EQ(dagger.heads, 8);
  EXPECT_EQ(dagger.candidates, 8192);

  const IndexerConfig residual = indexer_by_name("misa-r");
  EXPECT_EQ(residual.router, Router::nonlinearity);
  EXPECT_EQ(residual.heads, 7);
  EXPECT_TRUE(residual.residual);

  const IndexerConfig hisa = indexer_by_name("hisa");
  EXPECT_EQ(hisa.router, Router::all);
  EXPECT_EQ(hisa.filter_block, 128);
  EXPECT_EQ(hisa.filter_blocks, 64);
  EXPECT_EQ(hisa.dense_work, 0);

  const IndexerConfig automatic = indexer_by_name("auto");
  EXPECT_EQ(automatic.router, Router::nonlinearity);
  EXPECT_EQ(automatic.heads, 3);
  EXPECT_TRUE(automatic.residual);
  EXPECT_EQ(automatic.candidates, 4096);
  EXPECT_EQ(automatic.dense_work, 64 * 16384);
}

TEST(Config, EveryNamedIndexerIsValid) {
  for (const std::string_view name : indexer_names()) {
    const IndexerConfig config = indexer_by_name(name);
    EXPECT_EQ(config.top_k, 2048) << name;
    EXPECT_EQ(indexer_by_name(name, 512).top_k, 512) << name;
    EXPECT_NO_THROW(Plan(Context({.backend = "reference"}), config, {1, 32, 128, 1})) << name;
  }
}

TEST(Config, ConstructorsTakeTheirParameters) {
  EXPECT_EQ(IndexerConfig::dsa(5).top_k, 5);
  EXPECT_EQ(IndexerConfig::misa(5, 3).top_k, 5);
  EXPECT_EQ(IndexerConfig::misa(5, 3).heads, 3);
  EXPECT_EQ(IndexerConfig::misa_dagger(5, 3, 9).candidates, 9);
  EXPECT_EQ(IndexerConfig::misa_r(5, 3, 9).heads, 3);
  EXPECT_EQ(IndexerConfig::misa_r(5, 3, 9).candidates, 9);
  EXPECT_EQ(IndexerConfig::hisa(5, 64, 4).filter_block, 64);
  EXPECT_EQ(IndexerConfig::hisa(5, 64, 4).filter_blocks, 4);
  EXPECT_EQ(IndexerConfig::automatic(5).candidates, 10);
  EXPECT_EQ(IndexerConfig::automatic(5).dense_work, 2560);
}

TEST(Config, AutomaticTakesAnyTopK) {
  constexpr int kMost = std::numeric_limits<int>::max();
  EXPECT_EQ(IndexerConfig::automatic(kMost).candidates, kMost);
  EXPECT_EQ(IndexerConfig::automatic(kMost).dense_work, std::int64_t{512} * kMost);
}

TEST(Config, RouterNamesRoundTrip) {
  EXPECT_THAT(router_names(), ElementsAre("all", "pooled", "nonlinearity", "dispersion", "self",
                                          "qnorm", "weight", "static"));
  for (const std::string_view name : router_names()) {
    EXPECT_EQ(name_of(router_by_name(name)), name);
  }
  EXPECT_EQ(router_by_name("all"), Router::all);
  EXPECT_EQ(router_by_name("static"), Router::fixed);
}

TEST(Config, UnknownNamesListTheChoices) {
  EXPECT_EQ(message_of([] { indexer_by_name("dense"); }),
            "indexer: expected dsa, misa, misa-dagger, misa-r, hisa, auto, got 'dense'");
  EXPECT_EQ(message_of([] { router_by_name("fixed"); }),
            "router: expected all, pooled, nonlinearity, dispersion, self, qnorm, weight, static, "
            "got 'fixed'");
}

}  // namespace
}  // namespace misa
