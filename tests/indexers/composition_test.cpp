// SPDX-License-Identifier: Apache-2.0
// Combinations of block filter, router, residual and re-rank, and the identities between them.
#include <gmock/gmock.h>

#include "common.hpp"

namespace misa::test {
namespace {

using ::testing::Each;

constexpr int kTopK = 40;

class Composition : public EachBackend {
 protected:
  static PackSpec spec(DType k_dtype = DType::f32) {
    PackSpec spec;
    spec.sequences = {{0, 1}, {1, 1}, {39, 1}, {40, 1}, {41, 2}, {129, 1}, {400, 3}, {777, 2}};
    spec.heads = 8;
    spec.k_dtype = k_dtype;
    return spec;
  }

  // Checks that two configurations select the same positions with the same scores.
  void expect_same(const IndexerConfig& a, const IndexerConfig& b, const RaggedInputs& inputs,
                   const std::string& what) const {
    const Selected left = run(context(), a, inputs);
    const Selected right = run(context(), b, inputs);
    EXPECT_TRUE(same_bits(chosen(left), chosen(right))) << what;
  }

  // The selection without its heads and residual row.
  static Selected chosen(const Selected& all) {
    return {all.tokens, all.top_k, all.indices, all.scores, {}, {}};
  }
};

TEST_P(Composition, EveryOneMatchesTheReference) {
  const RaggedInputs inputs(make_pack(spec()));
  for (const NamedConfig& named : compositions(kTopK, 3)) {
    EXPECT_TRUE(valid(named.config, inputs, run(context(), named.config, inputs))) << named.name;
  }
}

TEST_P(Composition, EveryOneMatchesTheReferenceOnE4m3Keys) {
  const RaggedInputs inputs(make_pack(spec(DType::e4m3)));
  for (const NamedConfig& named : compositions(kTopK, 2)) {
    EXPECT_TRUE(valid(named.config, inputs, run(context(), named.config, inputs))) << named.name;
  }
}

TEST_P(Composition, MatchesTheReferenceAtTheExtremesOfHeads) {
  const RaggedInputs inputs(make_pack(spec(DType::bf16)));
  for (const int heads : {0, 1, 7, 8}) {
    for (const NamedConfig& named : compositions(kTopK, heads)) {
      IndexerConfig config = named.config;
      if (config.filter_block > 0 || (heads == 0 && !config.residual)) {
        continue;
      }
      for (int j = 0; config.router == Router::fixed && j < heads; ++j) {
        config.static_heads[j] = j;
      }
      EXPECT_TRUE(valid(config, inputs, run(context(), config, inputs)))
          << named.name << ", h = " << heads;
    }
  }
}

TEST_P(Composition, MatchesTheReferenceWhereKeysRepeat) {
  PackSpec repeated = spec();
  repeated.values = Values::repeated;
  const RaggedInputs inputs(make_pack(repeated));
  for (const NamedConfig& named : compositions(kTopK, 3)) {
    EXPECT_TRUE(valid(named.config, inputs, run(context(), named.config, inputs))) << named.name;
  }
}

TEST_P(Composition, TakesTheFirstPositionsWhereAllIsZero) {
  PackSpec zero = spec();
  zero.values = Values::zero;
  const RaggedInputs inputs(make_pack(zero));
  for (const NamedConfig& named : compositions(kTopK, 3)) {
    IndexerConfig config = named.config;
    config.filter_block = 0;
    const Selected result = run(context(), config, inputs);
    ASSERT_TRUE(valid(config, inputs, result)) << named.name;
    const std::int64_t last = result.tokens - 1;
    for (int i = 0; i < kTopK; ++i) {
      ASSERT_EQ(result.indices[last * kTopK + i], i) << named.name;
    }
  }
}

TEST_P(Composition, SmokeEveryHeadRoutedIsDsa) {
  const RaggedInputs inputs(make_pack(spec()));
  for (const NamedConfig& named : compositions(kTopK, 4)) {
    if (named.config.router == Router::all) {
      continue;
    }
    IndexerConfig config = named.config;
    config.heads = 8;
    if (config.router == Router::fixed) {
      config.static_heads = {7, 0, 6, 1, 5, 2, 4, 3};
    }
    IndexerConfig dsa = IndexerConfig::dsa(kTopK);
    dsa.filter_block = config.filter_block;
    dsa.filter_blocks = config.filter_blocks;
    expect_same(config, dsa, inputs, named.name);
    const Selected result = run(context(), config, inputs);
    for (std::int64_t t = 0; t < result.tokens; ++t) {
      for (std::int32_t j = 0; j < 8; ++j) {
        ASSERT_EQ(result.heads[t * 8 + j], t == 0 ? -1 : j) << named.name << ", query " << t;
      }
    }
    EXPECT_THAT(result.residual, Each(0.0F)) << named.name;
    // Nothing is routed or re-ranked, so the plan's workspace is that of DSA.
    const Shape shape{20, 8, 64, 5000, DType::f32, DType::f32};
    EXPECT_EQ(Plan(context(), config, shape).workspace_bytes(),
              Plan(context(), dsa, shape).workspace_bytes())
        << named.name;
  }
}

TEST_P(Composition, EveryPositionReRankedIsDsa) {
  const RaggedInputs inputs(make_pack(spec()));
  for (const NamedConfig& named : compositions(kTopK, 2)) {
    IndexerConfig config = named.config;
    config.filter_block = 0;
    config.candidates = 777;
    expect_same(config, IndexerConfig::dsa(kTopK), inputs, named.name);
  }
}

TEST_P(Composition, SmokeRowsOfLittleWorkAreDsa) {
  PackSpec by_length = spec();
  by_length.sequences = {{0, 1}, {41, 2}, {130, 2}, {400, 3}};
  const RaggedInputs inputs(make_pack(by_length));
  constexpr Rows kDense{0, 4};  // these see up to 129 positions
  constexpr Rows kLong{4, 4};
  const Selected dsa = run(context(), IndexerConfig::dsa(kTopK), inputs);
  for (const NamedConfig& named : compositions(kTopK, 3)) {
    IndexerConfig config = named.config;
    config.dense_work = 129 * by_length.heads;
    const Selected result = run(context(), config, inputs);
    EXPECT_TRUE(valid(config, inputs, result)) << named.name;
    const Selected dense = slice(result, kDense);
    EXPECT_TRUE(same_bits(chosen(dense), chosen(slice(dsa, kDense)))) << named.name;
    EXPECT_THAT(dense.heads, Each(-1)) << named.name;
    EXPECT_THAT(dense.residual, Each(0.0F)) << named.name;
    EXPECT_TRUE(same_bits(slice(result, kLong), slice(run(context(), named.config, inputs), kLong)))
        << named.name;
  }
}

TEST_P(Composition, EveryBlockKeptIsNoFilter) {
  const RaggedInputs inputs(make_pack(spec()));
  for (const NamedConfig& named : compositions(kTopK, 2)) {
    IndexerConfig filtered = named.config;
    filtered.filter_block = 128;
    filtered.filter_blocks = (777 + 127) / 128;
    IndexerConfig whole = named.config;
    whole.filter_block = 0;
    expect_same(filtered, whole, inputs, named.name);
  }
}

TEST_P(Composition, TheFilterKeepsTheFirstAndTheLastBlock) {
  // Keys of the first and the last block score lowest and all others are equal, so only the rule
  // keeps these blocks.
  PackSpec one;
  one.sequences = {{640, 1}};
  one.heads = 1;
  one.values = Values::zero;
  Pack pack = make_pack(one);
  pack.set_q(0, 0, 0, 1);
  pack.w[0] = -1;
  for (std::int64_t position = 0; position < 640; ++position) {
    pack.set_k(0, position, 0, position < 64 || position >= 576 ? 2.0F : 1.0F);
  }
  const IndexerConfig config = IndexerConfig::hisa(129, 64, 3);
  const RaggedInputs inputs(pack);
  const Selected result = run(context(), config, inputs);
  std::vector<std::int32_t> wanted;
  for (std::int32_t i = 0; i < 128; ++i) {
    wanted.push_back(i);  // the first block and the lowest of the equal blocks
  }
  wanted[64] = 64;
  wanted.push_back(576);
  EXPECT_EQ(result.indices, wanted);
}

TEST_P(Composition, GivenHeadsScoreLikeRoutedOnes) {
  PackSpec one;
  one.sequences = {{500, 1}};
  const RaggedInputs inputs(make_pack(one));
  for (const NamedConfig& named : compositions(kTopK, 3)) {
    if (named.config.router == Router::all) {
      continue;
    }
    IndexerConfig given = named.config;
    given.router = Router::fixed;
    given.static_heads = run(context(), named.config, inputs).heads;
    EXPECT_TRUE(same_bits(run(context(), named.config, inputs), run(context(), given, inputs)))
        << named.name;
  }
}

TEST_P(Composition, SmokeShortRowsSelectEveryPosition) {
  PackSpec small;
  small.sequences = {{-2, 1}, {0, 1}, {1, 2}, {17, 1}, {39, 1}, {40, 3}};
  small.sequences.front().keys = 0;
  const RaggedInputs inputs(make_pack(small));
  const std::vector<std::int64_t> lengths{0, 0, 0, 1, 17, 39, 38, 39, 40};
  for (const NamedConfig& named : compositions(kTopK, 2)) {
    const Selected result = run(context(), named.config, inputs);
    for (std::int64_t t = 0; t < result.tokens; ++t) {
      for (std::int32_t i = 0; i < kTopK; ++i) {
        ASSERT_EQ(result.indices[t * kTopK + i], i < lengths[t] ? i : -1) << named.name;
      }
    }
  }
}

TEST_P(Composition, OrderedRowsAreTheSameSet) {
  const RaggedInputs inputs(make_pack(spec()));
  for (const NamedConfig& named : named_configs(kTopK, 2)) {
    IndexerConfig ordered = named.config;
    ordered.ordered = true;
    expect_same(named.config, ordered, inputs, named.name);
  }
}

INSTANTIATE_TEST_SUITE_P(Each, Composition, ::testing::ValuesIn(available_backends()),
                         backend_name);

}  // namespace
}  // namespace misa::test
