// SPDX-License-Identifier: Apache-2.0
// A selection in parts is the selection of all queries at once.
#include "step.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdint>
#include <numeric>
#include <random>
#include <vector>

#include "misa/cache.hpp"
#include "misa/indexer.hpp"

namespace misa::cli {
namespace {

using ::testing::ElementsAre;

constexpr std::int64_t kHeads = 4;
constexpr std::int64_t kDim = 64;

// On one thread a part has 32 queries.
Context one_thread() { return Context({.threads = 1}); }

template <class Value>
std::vector<Value> random_values(std::int64_t count) {
  std::mt19937_64 random(7);
  std::uniform_int_distribution<int> values(0, 100);
  std::vector<Value> out(static_cast<std::size_t>(count));
  for (Value& value : out) {
    value = static_cast<Value>(values(random));
  }
  return out;
}

// Selects both ways, and returns the sizes of the parts.
std::vector<std::int64_t> expect_equal(const StepInputs& inputs) {
  const Context context = one_thread();
  for (const IndexerConfig& config :
       {IndexerConfig::dsa(16), IndexerConfig::misa(16, 2), IndexerConfig::misa_r(16, 2)}) {
    EXPECT_EQ(select_in_parts(context, config, inputs, [](std::int64_t) {}),
              select(context, config, inputs).indices);
  }
  std::vector<std::int64_t> parts;
  (void)select_in_parts(context, IndexerConfig::dsa(16), inputs,
                        [&](std::int64_t count) { parts.push_back(count); });
  return parts;
}

TEST(SelectInParts, SelectsTheSameOfContiguousKeys) {
  constexpr std::int64_t kQueries = 70;
  constexpr std::int64_t kKeys = 200;
  const auto q = random_values<std::uint16_t>(kQueries * kHeads * kDim);
  const auto w = random_values<float>(kQueries * kHeads);
  const auto k = random_values<float>(kKeys * kDim);
  std::vector<std::int32_t> starts(kQueries, 0);
  starts.back() = 9;
  std::vector<std::int32_t> ends(kQueries);
  std::iota(ends.begin(), ends.end(), static_cast<std::int32_t>(kKeys - kQueries + 1));
  const StepInputs inputs{{q.data(), DType::bf16, kQueries, kHeads, kDim},
                          {w.data(), kQueries, kHeads},
                          RaggedKeys{k.data(), DType::f32, kKeys, kDim, 0, nullptr, starts, ends}};
  EXPECT_THAT(expect_equal(inputs), ElementsAre(32, 32, 6));
}

TEST(SelectInParts, KeepsTheQueriesOfAPagedSequenceTogether) {
  constexpr std::int64_t kSequences = 8;
  constexpr std::int64_t kNext = 5;
  constexpr std::int64_t kPages = 2;  // of each sequence
  const auto q = random_values<float>(kSequences * kNext * kHeads * kDim);
  const auto w = random_values<float>(kSequences * kNext * kHeads);
  const auto cache = random_values<std::uint8_t>(cache_bytes(kSequences * kPages, kDim));
  std::vector<std::int32_t> table(kSequences * kPages);
  std::iota(table.rbegin(), table.rend(), 0);
  const std::vector<std::int32_t> lengths{128, 100, 64, 63, 5, 3, 0, 90};
  PagedKeys keys;
  keys.cache = {cache.data(), kSequences * kPages, kDim};
  keys.block_table = table.data();
  keys.max_pages = kPages;
  keys.context_lens = lengths;
  keys.next_n = kNext;
  const StepInputs inputs{{q.data(), DType::f32, kSequences * kNext, kHeads, kDim},
                          {w.data(), kSequences * kNext, kHeads},
                          keys};
  EXPECT_THAT(expect_equal(inputs), ElementsAre(35, 5));
}

TEST(SelectInParts, OfNoQueriesIsEmpty) {
  const std::vector<float> k(kDim);
  const StepInputs inputs{{nullptr, DType::f32, 0, kHeads, kDim},
                          {nullptr, 0, kHeads},
                          RaggedKeys{k.data(), DType::f32, 1, kDim, 0, nullptr, {}, {}}};
  EXPECT_THAT(expect_equal(inputs), ElementsAre());
}

}  // namespace
}  // namespace misa::cli
