// SPDX-License-Identifier: Apache-2.0
// A query's result depends on its own q, w and keys alone, bit for bit: never on later keys, the
// chunk, the batch, paging, threads or memory.
#include <initializer_list>
#include <limits>
#include <tuple>
#include <utility>
#include <vector>

#include "common.hpp"
#include "misa/error.hpp"
#include "support/float_mode.hpp"

namespace misa::test {
namespace {

constexpr int kTopK = 48;
constexpr std::int64_t kHeads = 6;

// One sequence, whose last positions have queries; its keys are e4m3 by default, so that it can be
// paged.
Pack sequence(std::int64_t keys, std::int64_t queries, std::uint64_t seed = 1,
              DType k_dtype = DType::e4m3) {
  PackSpec spec;
  spec.sequences = {{keys, queries}};
  spec.heads = kHeads;
  spec.q_dtype = DType::bf16;
  spec.k_dtype = k_dtype;
  spec.seed = seed;
  return make_pack(spec);
}

// Queries from the first token on, and queries at the end of a long context.
std::vector<Pack> sequences() { return {sequence(330, 330), sequence(2085, 43)}; }

std::vector<NamedConfig> configs(DType k_dtype = DType::e4m3) {
  std::vector<NamedConfig> all = named_configs(kTopK, 2);
  if (k_dtype == DType::e4m3) {
    const std::vector<NamedConfig> sketched = sketched_configs(kTopK, 2);
    all.insert(all.end(), sketched.begin(), sketched.end());
  }
  IndexerConfig everything = IndexerConfig::misa_r(kTopK, 2, 100);
  everything.filter_block = 128;
  everything.filter_blocks = 3;
  all.push_back({"hisa x misa-r re-ranked", everything});
  IndexerConfig dispersion = IndexerConfig::misa(kTopK, 2);
  dispersion.router = Router::dispersion;
  all.push_back({"dispersion", dispersion});
  IndexerConfig self = IndexerConfig::misa(kTopK, 2);
  self.router = Router::self;
  all.push_back({"self", self});
  return all;
}

class Invariance : public EachBackend {
 protected:
  // Runs the rows in chunks, one call per chunk.
  [[nodiscard]] Selected run_chunks(const IndexerConfig& config, const RaggedInputs& inputs,
                                    const std::vector<std::int64_t>& sizes) const {
    Selected whole;
    std::int64_t first = 0;
    for (std::size_t i = 0; first < inputs.tokens(); ++i) {
      const std::int64_t count = std::min(sizes[i % sizes.size()], inputs.tokens() - first);
      append_rows(whole, run(context(), config, inputs, {first, count}));
      first += count;
    }
    return whole;
  }

  // A decode batch: each run of next_n rows becomes a sequence that ends with the last of them.
  [[nodiscard]] static Pack decode_batch(const Pack& pack, std::int64_t next_n) {
    std::vector<Pack> steps;
    const std::int64_t queries = pack.tokens() / next_n * next_n;
    for (std::int64_t t = 0; t < queries; t += next_n) {
      steps.push_back(cut(pack, {t, next_n}));
    }
    return concat(steps);
  }
};

TEST_P(Invariance, APrefillIsItsChunks) {
  std::vector<Pack> packs = sequences();
  packs.push_back(sequence(400, 260, 2, DType::bf16));
  packs.push_back(sequence(400, 260, 3, DType::f32));
  for (const Pack& pack : packs) {
    const RaggedInputs inputs(pack);
    for (const NamedConfig& named : configs(pack.spec.k_dtype)) {
      EXPECT_TRUE(same_bits(run(context(), named.config, inputs),
                            run_chunks(named.config, inputs, {1, 64, 3, 65, 127, 2})))
          << named.name << ", " << name_of(pack.spec.k_dtype);
    }
  }
}

TEST_P(Invariance, APrefillIsItsTokensOneByOne) {
  for (const Pack& pack : sequences()) {
    const RaggedInputs inputs(pack);
    for (const NamedConfig& named : configs()) {
      EXPECT_TRUE(
          same_bits(run(context(), named.config, inputs), run_chunks(named.config, inputs, {1})))
          << named.name;
    }
  }
}

TEST_P(Invariance, DecodeFromPagesIsPrefill) {
  for (const Pack& pack : sequences()) {
    const RaggedInputs prefill(pack, 3);
    for (const NamedConfig& named : configs()) {
      const Selected whole = run(context(), named.config, prefill);
      // Pages in order and shuffled, padded, with page sums and without.
      for (const auto& [next_n, layout] :
           std::initializer_list<std::pair<std::int64_t, PageLayout>>{
               {1, {5, 0, false}}, {1, {0, 0, true}}, {3, {0, 0, false}}, {3, {6, 12, true}}}) {
        const Pack batch = decode_batch(pack, next_n);
        EXPECT_TRUE(same_bits(run(context(), named.config, PagedInputs(batch, layout)),
                              slice(whole, {0, batch.tokens()})))
            << named.name << ", next_n = " << next_n << ", page sums: " << layout.page_sums;
      }
    }
  }
}

TEST_P(Invariance, SmokePagesOfAPrefillAreRagged) {
  const Pack pack = sequence(200, 40);
  for (const NamedConfig& named : configs()) {
    EXPECT_TRUE(same_bits(run(context(), named.config, PagedInputs(pack, {3, 1, true})),
                          run(context(), named.config, RaggedInputs(pack))))
        << named.name;
  }
}

// Where keys and page sums lie, and how a call says which keys its rows see, change nothing.
TEST_P(Invariance, PagesOfEverySizeAreRagged) {
  const Pack equal = concat({sequence(300, 3), sequence(1, 3, 2), sequence(129, 3, 3)});
  const Pack unequal =
      concat({sequence(300, 40), sequence(64, 0, 2), sequence(128, 1, 3), sequence(40, 2, 4)});
  for (const NamedConfig& named : configs()) {
    const Selected wanted = run(context(), named.config, RaggedInputs(equal));
    const Selected wanted_unequal = run(context(), named.config, RaggedInputs(unequal));
    for (const std::int64_t page_size : {32, 64, 128}) {
      for (const auto& [padding, sums, tail] :
           std::initializer_list<std::tuple<std::int64_t, bool, bool>>{
               {0, false, false}, {0, true, false}, {3, true, false}, {32, true, true}}) {
        for (const Lengths lengths :
             {Lengths::next_n, Lengths::query_starts, Lengths::rows, Lengths::starts_and_rows}) {
          const PageLayout layout{5, padding, sums, page_size, tail, lengths};
          EXPECT_TRUE(same_bits(run(context(), named.config, PagedInputs(equal, layout)), wanted))
              << named.name << ", pages of " << page_size << ", sums: " << sums
              << ", tail: " << tail << ", lengths: " << static_cast<int>(lengths);
          if (lengths == Lengths::query_starts || lengths == Lengths::starts_and_rows) {
            EXPECT_TRUE(same_bits(run(context(), named.config, PagedInputs(unequal, layout)),
                                  wanted_unequal))
                << named.name << ", pages of " << page_size << ", sums: " << sums
                << ", tail: " << tail << ", lengths: " << static_cast<int>(lengths);
          }
        }
      }
    }
  }
}

// The rows of one sequence may have lengths in any order, and none.
TEST_P(Invariance, LengthsByRowMayBeInAnyOrder) {
  const Pack pack = sequence(300, 7);
  const std::vector<std::int32_t> lengths{64, 300, 0, 129, -5, 299, 64};
  const std::vector<std::int32_t> ends{64, 300, 0, 129, 0, 299, 64};
  const RaggedInputs ragged(pack);
  RaggedKeys keys = ragged.k(ragged.all());
  keys.ends = ends;
  constexpr Want kAll{true, true, true};
  for (const NamedConfig& named : configs()) {
    const Selected wanted =
        select(context(), named.config, ragged.q(ragged.all()), ragged.w(ragged.all()), keys, kAll);
    for (const std::int64_t page_size : {32, 64, 128}) {
      for (const Lengths form : {Lengths::rows, Lengths::starts_and_rows}) {
        const PagedInputs paged(pack, {3, 0, true, page_size, false, form});
        PagedKeys view = paged.k(paged.all());
        view.row_lens = lengths;
        EXPECT_TRUE(same_bits(
            select(context(), named.config, paged.q(paged.all()), paged.w(paged.all()), view, kAll),
            wanted))
            << named.name << ", pages of " << page_size;
      }
    }
  }
}

TEST_P(Invariance, AnotherBatchAroundChangesNothing) {
  const Pack pack = sequence(300, 40);
  const Pack batch = concat({sequence(700, 40, 2), sequence(0, 40, 3), pack, sequence(65, 40, 4)});
  for (const NamedConfig& named : configs()) {
    const Selected alone = run(context(), named.config, RaggedInputs(pack));
    const Selected ragged = run(context(), named.config, RaggedInputs(batch));
    EXPECT_TRUE(same_bits(slice(ragged, {80, 40}), alone)) << named.name;
    const Selected paged = run(context(), named.config, PagedInputs(batch, {9, 0, true}));
    EXPECT_TRUE(same_bits(slice(paged, {80, 40}), alone)) << named.name;
  }
}

TEST_P(Invariance, SmokeThreadsChangeNothing) {
  const RaggedInputs inputs(concat({sequence(300, 40), sequence(90, 20, 2), sequence(700, 9, 3)}));
  for (const NamedConfig& named : configs()) {
    const Selected one = run(context(1), named.config, inputs);
    EXPECT_TRUE(same_bits(run(context(2), named.config, inputs), one)) << named.name;
    EXPECT_TRUE(same_bits(run(context(5), named.config, inputs), one)) << named.name;
  }
}

TEST_P(Invariance, FloatingPointModeOfTheCaller) {
  for (const DType k_dtype : {DType::f32, DType::e4m3}) {
    Pack pack = sequence(2085, 43, 1, k_dtype);
    for (float& w : pack.w) {
      w *= 0x1p-126F;  // scores near the smallest normal number, many of them below
    }
    const RaggedInputs inputs(pack);
    for (const NamedConfig& named : configs(k_dtype)) {
      for (const int threads : {1, 3}) {
        const Selected expected = run(context(threads), named.config, inputs);
        const OtherFloatMode mode;
        EXPECT_TRUE(same_bits(run(context(threads), named.config, inputs), expected))
            << named.name << ", " << name_of(k_dtype) << ", " << threads << " threads";
      }
    }
  }
}

// The smallest power of two that suffices as a workspace cap for this call.
std::size_t smallest_cap(const std::string& backend, const IndexerConfig& config,
                         const Shape& shape) {
  ContextOptions options;
  options.backend = backend;
  options.threads = 1;
  for (options.workspace_cap = 1;; options.workspace_cap *= 2) {
    try {
      const Plan plan(Context(options), config, shape);
      EXPECT_LE(plan.workspace_bytes(), options.workspace_cap);
      return options.workspace_cap;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::workspace) << error.what();
      if (error.code() != ErrorCode::workspace) {
        return options.workspace_cap;
      }
    }
  }
}

TEST_P(Invariance, SmokeMemoryChangesNothing) {
  const Pack pack = concat({sequence(300, 90), sequence(700, 30, 2)});
  const RaggedInputs inputs(pack);
  for (const NamedConfig& named : configs()) {
    ContextOptions options;
    options.backend = GetParam();
    options.threads = 1;
    options.workspace_cap = smallest_cap(
        GetParam(), named.config, {pack.tokens(), kHeads, 64, 700, DType::bf16, DType::e4m3});
    EXPECT_TRUE(same_bits(run(Context(options), named.config, inputs),
                          run(context(), named.config, inputs)))
        << named.name << " in " << options.workspace_cap << " bytes";
  }
}

TEST_P(Invariance, LaterKeysChangeNothing) {
  const Pack pack = sequence(400, 120);
  constexpr std::int64_t kChanged = 335;  // in the middle of a page, a block and the queries
  constexpr Rows kBefore{0, 120 - (400 - kChanged)};
  for (const float value : {100.0F, std::numeric_limits<float>::quiet_NaN()}) {
    Pack later = pack;
    for (std::int64_t position = kChanged; position < 400; ++position) {
      for (std::int64_t d = 0; d < 64; ++d) {
        later.set_k(0, position, d, value);
      }
      later.scale[0][position] *= 3;
    }
    for (const NamedConfig& named : configs()) {
      const Selected wanted = slice(run(context(), named.config, RaggedInputs(pack)), kBefore);
      EXPECT_TRUE(
          same_bits(slice(run(context(), named.config, RaggedInputs(later)), kBefore), wanted))
          << named.name;
      EXPECT_TRUE(same_bits(
          slice(run(context(), named.config, PagedInputs(later, {1, 0, true})), kBefore), wanted))
          << named.name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Each, Invariance, ::testing::ValuesIn(available_backends()), backend_name);

}  // namespace
}  // namespace misa::test
