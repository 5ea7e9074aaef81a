// SPDX-License-Identifier: Apache-2.0
// Fused scoring on a device: e4m3 at D = 128, at the edges of its key tiles and query blocks, and
// rows whose gate threshold, taken from a sample, is misleading. On other devices the generic
// kernels pass the same tests.
#include <algorithm>
#include <cmath>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "common.hpp"
#include "fused/work_plan.hpp"
#include "support/adversarial.hpp"

namespace misa::test {
namespace {

constexpr int kTopK = 48;
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// Long enough that thresholds are taken from samples, about every tenth key.
constexpr std::int64_t kLong = 20000;

PackSpec spec_of(std::vector<SequenceSpec> sequences, std::int64_t heads) {
  PackSpec spec;
  spec.sequences = std::move(sequences);
  spec.heads = heads;
  spec.dim = 128;
  spec.q_dtype = DType::e4m3;
  spec.k_dtype = DType::e4m3;
  return spec;
}

// Keeps as many blocks as `positions` positions need.
NamedConfig filtered(NamedConfig named, int positions, int block = 64) {
  named.name += " filtered";
  named.config.filter_block = block;
  named.config.filter_blocks = (positions + block - 1) / block;
  return named;
}

// Configs that score fused, and configs that score gathered keys: of kept blocks, or candidates.
std::vector<NamedConfig> configs(int top_k, int heads) {
  const NamedConfig dsa{"dsa", IndexerConfig::dsa(top_k)};
  const NamedConfig misa_r{"misa-r", IndexerConfig::misa_r(top_k, heads)};
  return {dsa,
          {"misa", IndexerConfig::misa(top_k, heads)},
          misa_r,
          {"misa-r re-ranked", IndexerConfig::misa_r(top_k, heads, 2 * top_k)},
          filtered(dsa, 4 * top_k),
          filtered(misa_r, 4 * top_k)};
}

class Fused : public EachCudaBackend {
 protected:
  // Skips configs that re-rank: checking these on long rows takes n^2 comparisons.
  void expect_valid(const Pack& pack, const std::string& what) const {
    const RaggedInputs inputs(pack);
    for (const NamedConfig& named : configs(kTopK, 2)) {
      if (named.config.candidates > 0) {
        continue;
      }
      EXPECT_TRUE(valid(named.config, inputs, run(context(), named.config, inputs)))
          << named.name << ", " << what;
    }
  }
};

// Lengths around multiples of the tile, and query blocks that span sequences.
TEST_P(Fused, MatchesTheReferenceAroundEveryTile) {
  for (const int heads : {1, 3, 8, 31, 64}) {
    const RaggedInputs inputs(make_pack(spec_of({{0, 2},
                                                 {1, 1},
                                                 {47, 2},
                                                 {49, 2},
                                                 {127, 1},
                                                 {128, 1},
                                                 {129, 3},
                                                 {255, 1},
                                                 {257, 2},
                                                 {385, 70}},
                                                heads)));
    const auto judge = [&](const NamedConfig& named) {
      EXPECT_TRUE(valid(named.config, inputs, run(context(), named.config, inputs)))
          << named.name << ", " << heads << " heads, " << named.config.heads << " routed";
    };
    judge({"dsa", IndexerConfig::dsa(kTopK)});
    judge(filtered({"dsa", IndexerConfig::dsa(kTopK)}, 4 * kTopK));
    // With and without a residual row: some, and all, of the rows that each kernel is built for.
    for (const int routed : {3, 7, 15, 31, 33}) {
      for (const NamedConfig& named : configs(kTopK, routed)) {
        if (routed <= heads && named.config.router != Router::all) {
          judge(named);
        }
      }
    }
  }
}

TEST_P(Fused, SmokeMatchesTheReferenceOnLongRows) {
  expect_valid(make_pack(spec_of({{kLong, 3}, {300, 2}, {3000, 2}}, 4)), "long rows");
}

// More rows than the fused kernels support.
TEST_P(Fused, ManyHeadsMatchTheReference) {
  expect_valid(make_pack(spec_of({{700, 3}}, 65)), "65 heads");
}

TEST_P(Fused, MatchesTheReferenceUnderNegativeScales) {
  Pack pack = make_pack(spec_of({{kLong, 2}, {900, 2}}, 4));
  for (auto& scales : pack.scale) {
    for (std::size_t i = 0; i < scales.size(); ++i) {
      scales[i] = i % 3 == 0 ? -scales[i] : scales[i];
    }
  }
  expect_valid(pack, "negative scales");
}

TEST_P(Fused, EveryHeadRoutedIsDsa) {
  for (const int heads : {4, 16, 64}) {
    const RaggedInputs inputs(make_pack(spec_of({{kLong, 65}, {50, 3}, {2000, 20}}, heads)));
    const Selected dsa = run(context(), IndexerConfig::dsa(kTopK), inputs);
    for (const NamedConfig& named : configs(kTopK, heads)) {
      const bool whole = named.config.candidates == 0 && named.config.filter_block == 0;
      if (named.config.router != Router::all && whole) {
        const Selected routed = run(context(), named.config, inputs);
        EXPECT_EQ(routed.indices, dsa.indices) << named.name << ", " << heads << " heads";
        EXPECT_EQ(routed.scores, dsa.scores) << named.name << ", " << heads << " heads";
      }
    }
  }
}

// Rows of 700 keys, which are all candidates, or whose blocks are all kept, and a longer row. There
// are so many queries that a thread block has one, or several, of a query's tiles of gathered keys.
// With and without a few negative scales.
struct GatheredPack {
  std::string name;
  RaggedInputs inputs;
  Rows shorter;
};

std::vector<GatheredPack> gathered_packs(int heads) {
  std::vector<GatheredPack> packs;
  for (const std::int64_t queries : {65, 200}) {
    Pack pack = make_pack(spec_of({{3000, 2}, {130, 2}, {700, queries}}, heads));
    const std::string name =
        std::to_string(heads) + " heads, " + std::to_string(queries) + " queries";
    const Rows shorter{2, queries + 2};
    packs.push_back({name, RaggedInputs(pack), shorter});
    for (auto& scales : pack.scale) {
      for (std::size_t i = 77; i < scales.size(); i += 301) {
        scales[i] = -scales[i];
      }
    }
    packs.push_back({name + ", negative scales", RaggedInputs(pack), shorter});
  }
  return packs;
}

TEST_P(Fused, SmokeEveryPositionReRankedIsDsa) {
  for (const int heads : {5, 64}) {
    for (const GatheredPack& pack : gathered_packs(heads)) {
      const Selected dsa = run(context(), IndexerConfig::dsa(kTopK), pack.inputs);
      const Selected ranked = run(context(), IndexerConfig::misa_r(kTopK, 3, 700), pack.inputs);
      EXPECT_EQ(slice(ranked, pack.shorter).indices, slice(dsa, pack.shorter).indices) << pack.name;
      EXPECT_EQ(slice(ranked, pack.shorter).scores, slice(dsa, pack.shorter).scores) << pack.name;
    }
  }
}

TEST_P(Fused, SmokeEveryBlockKeptIsNoFilter) {
  for (const int heads : {5, 64}) {
    for (const GatheredPack& pack : gathered_packs(heads)) {
      for (const NamedConfig& named : {NamedConfig{"dsa", IndexerConfig::dsa(kTopK)},
                                       NamedConfig{"misa", IndexerConfig::misa(kTopK, 3)},
                                       NamedConfig{"misa-r", IndexerConfig::misa_r(kTopK, 3)}}) {
        const Selected whole = run(context(), named.config, pack.inputs);
        for (const int block : {64, 192}) {
          EXPECT_TRUE(same_bits(
              slice(run(context(), filtered(named, 700, block).config, pack.inputs), pack.shorter),
              slice(whole, pack.shorter)))
              << named.name << ", " << pack.name << ", blocks of " << block;
        }
      }
    }
  }
}

TEST_P(Fused, ChunksChangeNothing) {
  for (const int heads : {8, 64}) {
    for (const std::int64_t keys : {std::int64_t{265}, kLong}) {
      const RaggedInputs inputs(make_pack(spec_of({{keys, 265}}, heads)));
      for (const NamedConfig& named : configs(kTopK, 3)) {
        const Selected whole = run(context(), named.config, inputs);
        std::int64_t first = 0;
        for (const std::int64_t count : {1, 63, 64, 65, 72}) {
          const Rows rows{first, count};
          EXPECT_TRUE(same_bits(run(context(), named.config, inputs, rows), slice(whole, rows)))
              << named.name << ", " << heads << " heads, " << keys << " keys, " << count
              << " queries from " << first;
          first += count;
        }
        ASSERT_EQ(first, inputs.tokens());
      }
    }
  }
}

// Thread blocks whose splits span two query blocks (fused::KeySplits), compared with chunks where
// they do not.
TEST_P(Fused, SmokeSplitsAcrossQueryBlocksChangeNothing) {
  for (const int rows : {16, 32}) {
    const std::int64_t block = 512 / rows;  // queries; the two sequences meet in the middle of one
    const Pack pack = make_pack(spec_of({{kLong, 31 * block + block / 2}, {900, 3 * block}}, 32));
    const RaggedInputs inputs(pack);
    const cuda::fused::WorkPlan whole =
        cuda::fused::plan_work({inputs.tokens(), kLong + 900, kLong, rows, kTopK, 132});
    const cuda::fused::WorkPlan chunk =
        cuda::fused::plan_work({block, kLong + 900, kLong, rows, kTopK, 132});
    ASSERT_GT(whole.key_splits.per_block, 1) << rows << " rows";  // with 132 SMs
    ASSERT_EQ(chunk.key_splits.per_block, 1);
    for (const NamedConfig& named : configs(kTopK, rows - 1)) {
      if (named.config.filter_blocks > 0 || named.config.candidates > 0) {
        continue;
      }
      const Selected selected = run(context(), named.config, inputs);
      for (std::int64_t first = 0; first < inputs.tokens(); first += 11 * block + 1) {
        const Rows some{first, std::min(block, inputs.tokens() - first)};
        EXPECT_TRUE(same_bits(run(context(), named.config, inputs, some), slice(selected, some)))
            << named.name << ", " << rows << " rows, " << some.count << " queries from " << first;
      }
    }
  }
}

// The length of the longest row decides which stages run.
TEST_P(Fused, AnotherBatchAroundChangesNothing) {
  const Pack pack = make_pack(spec_of({{2 * kTopK - 5, 40}}, 8));
  const Pack other = make_pack(spec_of({{kLong, 33}}, 8));
  for (const NamedConfig& named : configs(kTopK, 3)) {
    EXPECT_TRUE(same_bits(
        slice(run(context(), named.config, RaggedInputs(concat({other, pack}))), {33, 40}),
        run(context(), named.config, RaggedInputs(pack))))
        << named.name;
  }
}

TEST_P(Fused, WorkspaceCapsChangeNothing) {
  const RaggedInputs inputs(make_pack(spec_of({{kLong, 200}, {700, 70}}, 8)));
  for (const NamedConfig& named : configs(kTopK, 3)) {
    const Selected expected = run(context(), named.config, inputs);
    for (const std::size_t megabytes : {8, 16}) {
      ContextOptions options;
      options.backend = GetParam();
      options.workspace_cap = megabytes << 20;
      EXPECT_TRUE(same_bits(run(Context(options), named.config, inputs), expected))
          << named.name << " in " << megabytes << " MB";
    }
  }
}

// Tied scores, too few scores above them, scores in order. They are exact, so the bits must be
// those of the reference.
TEST_P(Fused, RowsOnWhichSelectorsBreak) {
  for (const ScoreRow& row : adversarial_rows()) {
    if (!row.finite) {
      continue;
    }
    for (const int top_k : {kTopK, 2048}) {
      const RaggedInputs inputs(pack_with_scores(row.make(kLong, top_k), 3, DType::e4m3));
      const IndexerConfig config = IndexerConfig::dsa(top_k);
      EXPECT_TRUE(
          same_bits(run(context(), config, inputs), run(context_for("reference"), config, inputs)))
          << row.name << ", k = " << top_k;
    }
  }
}

// Samples that all score lower, or all higher, than the keys between them, at several distances.
TEST_P(Fused, SamplesThatMislead) {
  for (const std::int64_t distance : {2, 5, 10, 16, 20}) {
    for (const float sampled : {0.5F, 30000.0F}) {
      std::vector<float> scores;
      for (std::int64_t i = 0; i < kLong; ++i) {
        const float other = static_cast<float>(1 + i * 7919 % kLong);
        scores.push_back(i % distance == 0 ? sampled : other);
      }
      const RaggedInputs inputs(pack_with_scores(scores, 3, DType::e4m3));
      for (const int top_k : {kTopK, 2048}) {
        const IndexerConfig config = IndexerConfig::dsa(top_k);
        EXPECT_TRUE(same_bits(run(context(), config, inputs),
                              run(context_for("reference"), config, inputs)))
            << "every " << distance << "th is " << sampled << ", k = " << top_k;
      }
    }
  }
}

TEST_P(Fused, MatchesTheReferenceWhereKeysRepeat) {
  PackSpec spec = spec_of({{kLong, 2}, {300, 2}}, 4);
  spec.values = Values::repeated;
  expect_valid(make_pack(spec), "every key the same");
  spec.values = Values::zero;
  expect_valid(make_pack(spec), "all zero");
}

// Rows with fewer than k scores that are not NaN, or none, together with rows that have k.
TEST_P(Fused, NaNRanksLast) {
  const Pack clean = make_pack(spec_of({{300, 2}, {kLong, 2}, {500, 2}}, 4));
  const auto poison = [&](const std::function<void(Pack&, std::int64_t)>& apply,
                          std::int64_t but_every) {
    Pack pack = clean;
    for (std::int64_t i = 0; i < kLong; ++i) {
      if (but_every == 0 || i % but_every != 0) {
        apply(pack, i);
      }
    }
    return pack;
  };
  const auto key = [](Pack& pack, std::int64_t i) { pack.set_k(1, i, i % 128, kNaN); };
  const auto scale = [](Pack& pack, std::int64_t i) { pack.scale[1][i] = kNaN; };
  for (const std::int64_t but_every : {0, 1000, 100, 2}) {
    const std::string but = " but every " + std::to_string(but_every);
    expect_valid(poison(key, but_every), "NaN keys" + but);
    expect_valid(poison(scale, but_every), "NaN scales" + but);
  }
  Pack query = clean;
  query.set_q(2, 1, 77, kNaN);
  query.w[3 * 4 + 2] = kNaN;
  expect_valid(query, "NaN in a query and a weight");
}

// The same for sanitizers, with few fallback rows.
TEST_P(Fused, SmokeFallbackRows) {
  Pack pack = make_pack(spec_of({{3000, 2}, {500, 2}}, 4));
  for (std::int64_t i = 0; i < 3000; ++i) {
    if (i % 100 != 0) {
      pack.scale[0][i] = kNaN;
    }
  }
  expect_valid(pack, "NaN scales but every 100");
}

INSTANTIATE_TEST_SUITE_P(Each, Fused, ::testing::ValuesIn(cuda_backends_of_this_build()),
                         backend_name);

}  // namespace
}  // namespace misa::test
