// SPDX-License-Identifier: Apache-2.0
// Fused scoring on a device: e4m3 at D = 128, around its tiles of keys and blocks of queries, and
// rows whose threshold, taken from a sample, misleads. Where its kernels are not to be had, the
// generic ones pass the same tests.
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

// Long enough that a threshold comes from samples, every tenth key or so of them.
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

// Keeps as many blocks as `positions` take.
NamedConfig filtered(NamedConfig named, int positions, int block = 64) {
  named.name += " filtered";
  named.config.filter_block = block;
  named.config.filter_blocks = (positions + block - 1) / block;
  return named;
}

// Which all score fused, and which score listed keys: of kept blocks, or re-ranked.
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
  // What one stage of scores returns. (Judging a re-rank of long rows takes n^2 comparisons.)
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

// Around the multiples of tiles, and blocks of queries that stand across sequences.
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
    // Alone and with a residual row: a part, and all, of the rows that each kernel is built for.
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

// More rows than the fused kernels take.
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

// Rows of 700 keys that are candidates as a whole, or whose blocks are all kept, beside a longer
// one; queries enough for thread blocks to have one, and several, of a query's tiles of listed
// keys. With and without a few negative scales.
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

// Thread blocks that go on from one block of queries to the next (fused::Deal), which the chunks'
// do not.
TEST_P(Fused, SmokePartsOfSeveralBlocksChangeNothing) {
  for (const int rows : {16, 32}) {
    const std::int64_t block = 512 / rows;  // and a half, so that the two sequences meet in one
    const Pack pack = make_pack(spec_of({{kLong, 31 * block + block / 2}, {900, 3 * block}}, 32));
    const RaggedInputs inputs(pack);
    const cuda::fused::WorkPlan whole =
        cuda::fused::plan_work({inputs.tokens(), kLong + 900, kLong, rows, kTopK, 132});
    const cuda::fused::WorkPlan chunk =
        cuda::fused::plan_work({block, kLong + 900, kLong, rows, kTopK, 132});
    ASSERT_GT(whole.all.share, 1) << rows << " rows";  // on a device with so many num_sms
    ASSERT_EQ(chunk.all.share, 1);
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

// Also where the length of the longest row decides which stages there are.
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

TEST_P(Fused, SlabsChangeNothing) {
  const RaggedInputs inputs(make_pack(spec_of({{kLong, 200}, {700, 70}}, 8)));
  for (const NamedConfig& named : configs(kTopK, 3)) {
    const Selected wanted = run(context(), named.config, inputs);
    for (const std::size_t megabytes : {8, 16}) {
      ContextOptions options;
      options.backend = GetParam();
      options.workspace_cap = megabytes << 20;
      EXPECT_TRUE(same_bits(run(Context(options), named.config, inputs), wanted))
          << named.name << " in " << megabytes << " MB";
    }
  }
}

// Plateaus, too few scores above them, scores in order: exact, so the reference's bits are wanted.
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

// Samples that are all worse, or all better, than the keys between them, whatever their distance.
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

// Rows with fewer numbers than k, or none, beside rows that have them.
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

// The same for sanitizers: no more than a few rows that are fallback.
TEST_P(Fused, SmokeMissedRows) {
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
