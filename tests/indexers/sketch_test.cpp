// SPDX-License-Identifier: Apache-2.0
// First scores from a sketch of the keys. That a query's result is its own is tested with the other
// indexers (invariance_test, nonfinite_test).
#include "core/recipe.hpp"

#include "common.hpp"

namespace misa::test {
namespace {

constexpr int kTopK = 40;

class Sketched : public EachBackend {
 protected:
  static PackSpec spec(DType q_dtype, std::int64_t dim = 64) {
    PackSpec spec;
    spec.sequences = {{0, 1}, {1, 1}, {39, 1}, {41, 2}, {129, 1}, {300, 5}, {777, 2}};
    spec.heads = 8;
    spec.dim = dim;
    spec.q_dtype = q_dtype;
    spec.k_dtype = DType::e4m3;
    return spec;
  }

  void expect_valid(const PackSpec& spec) const {
    const RaggedInputs inputs(make_pack(spec), 3);
    for (const NamedConfig& named : sketched_configs(kTopK, 3)) {
      EXPECT_TRUE(valid(named.config, inputs, run(context(), named.config, inputs)))
          << named.name << ", " << name_of(spec.q_dtype);
    }
  }
};

TEST_P(Sketched, SmokeMatchesTheReference) { expect_valid(spec(DType::e4m3)); }

TEST_P(Sketched, MatchesTheReferenceAtD128) {
  for (const DType q_dtype : {DType::e4m3, DType::bf16, DType::f32}) {
    expect_valid(spec(q_dtype, 128));
  }
}

TEST_P(Sketched, MatchesTheReferenceOnTies) {
  for (const Values values : {Values::integers, Values::zero, Values::repeated}) {
    PackSpec tied = spec(DType::bf16);
    tied.values = values;
    expect_valid(tied);
  }
}

TEST_P(Sketched, MatchesTheReferenceOnPages) {
  PackSpec paged = spec(DType::bf16);
  paged.sequences = {{777, 2}, {0, 2}, {90, 2}, {300, 2}};
  const Pack pack = make_pack(paged);
  for (const NamedConfig& named : sketched_configs(kTopK, 3)) {
    const PagedInputs inputs(pack, {7, 5, true});
    const Selected result = run(context(), named.config, inputs);
    EXPECT_TRUE(valid(named.config, inputs, result)) << named.name;
    EXPECT_TRUE(same_bits(result, run(context(), named.config, RaggedInputs(pack)))) << named.name;
  }
}

// Every composition of block filter, router and residual row.
TEST_P(Sketched, EveryCompositionMatchesTheReference) {
  const RaggedInputs inputs(make_pack(spec(DType::bf16)));
  for (const NamedConfig& named : compositions(kTopK, 3)) {
    for (const int sketch : {2, 4}) {
      IndexerConfig config = named.config;
      config.sketch = sketch;
      if (config.candidates > 0) {
        EXPECT_TRUE(valid(config, inputs, run(context(), config, inputs)))
            << named.name << ", " << sketch << " bits";
      }
    }
  }
}

// Few negative scales, as no quantiser writes them; they change the sign of a key.
TEST_P(Sketched, MatchesTheReferenceWithNegativeScales) {
  Pack pack = make_pack(spec(DType::e4m3));
  for (std::vector<float>& scales : pack.scale) {
    for (std::size_t i = 0; i < scales.size(); i += 3) {
      scales[i] *= i % 2 == 0 ? -1.0F : 1e-3F;
    }
  }
  const RaggedInputs inputs(pack);
  for (const NamedConfig& named : sketched_configs(kTopK, 3)) {
    EXPECT_TRUE(valid(named.config, inputs, run(context(), named.config, inputs))) << named.name;
  }
}

TEST_P(Sketched, SmokeEveryPositionReRankedIsDsa) {
  const RaggedInputs inputs(make_pack(spec(DType::bf16)));
  const Selected dsa = run(context(), IndexerConfig::dsa(kTopK), inputs);
  for (const NamedConfig& named : sketched_configs(kTopK, 3)) {
    IndexerConfig config = named.config;
    config.filter_block = 0;
    config.candidates = 777;
    const Selected result = run(context(), config, inputs);
    EXPECT_EQ(result.indices, dsa.indices) << named.name;
    EXPECT_EQ(result.scores, dsa.scores) << named.name;
  }
}

// Rows that are DSA's whatever the config says do not read the sketch either.
TEST_P(Sketched, SmokeDenseRowsAndEveryHeadRoutedAreDsa) {
  const RaggedInputs inputs(make_pack(spec(DType::bf16)));
  const Selected dsa = run(context(), IndexerConfig::dsa(kTopK), inputs);
  for (const NamedConfig& named : sketched_configs(kTopK, 3)) {
    IndexerConfig dense = named.config;
    dense.dense_work = std::int64_t{8} * 777;
    EXPECT_EQ(run(context(), dense, inputs).indices, dsa.indices) << named.name;
    IndexerConfig every = named.config;
    if (every.router != Router::all && every.filter_block == 0) {
      every.heads = 8;
      const Selected result = run(context(), every, inputs);
      EXPECT_EQ(result.indices, dsa.indices) << named.name;
      EXPECT_EQ(result.scores, dsa.scores) << named.name;
    }
  }
}

// The sketch is what is scored: rows of more than m keys differ from those without it.
TEST_P(Sketched, SmokeASketchChangesTheFirstScores) {
  PackSpec one = spec(DType::bf16);
  one.sequences = {{4000, 8}};
  const RaggedInputs inputs(make_pack(one));
  for (const NamedConfig& named : sketched_configs(kTopK, 3)) {
    IndexerConfig narrow = named.config;
    narrow.candidates = kTopK;
    IndexerConfig without = narrow;
    without.sketch = 0;
    EXPECT_NE(run(context(), narrow, inputs).indices, run(context(), without, inputs).indices)
        << named.name;
  }
}

INSTANTIATE_TEST_SUITE_P(Each, Sketched, ::testing::ValuesIn(available_backends()), backend_name);

}  // namespace
}  // namespace misa::test
