// SPDX-License-Identifier: Apache-2.0
// What is said of all traces together: names, order, means, the worst trace, the verdict.
#include "summary.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <string>
#include <vector>

namespace misa::cli {
namespace {

using ::testing::ElementsAre;

IndexerResult result(const char* name, double recall, double microseconds, double dots) {
  return {name,
          std::string(name) == "dsa" ? "DSA" : name,
          Summary{recall, recall, recall},
          {},
          {1e-6 * microseconds, 0, 0, 1e-7 * microseconds, 5},
          {dots, 2 * dots},
          1000,
          IndexerConfig::dsa(8)};
}

// The layers 2, 10 and 1 of one model, in this order.
std::vector<TraceResult> layers() {
  std::vector<TraceResult> traces(3);
  const std::vector<std::string> numbers{"2", "10", "1"};
  const std::vector<double> fast{0.97, 0.99, 0.98};
  const std::vector<double> faster{0.99, 0.94, 0.99};
  for (std::size_t i = 0; i < 3; ++i) {
    traces[i].file = "some/layer_" + numbers[i] + ".safetensors";
    traces[i].layer = numbers[i];
    traces[i].shape = {16, 4, 64, 100, DType::f32, DType::f32};
    traces[i].long_rows = 16;
    traces[i].indexers = {result("dsa", 1, 100 + 10 * static_cast<double>(i), 800),
                          result("fast", fast[i], 50, 200), result("faster", faster[i], 25, 100)};
  }
  name_traces(traces);
  return traces;
}

std::vector<std::string> names(const std::vector<TraceResult>& traces) {
  std::vector<std::string> out;
  for (const TraceResult& trace : traces) {
    out.push_back(trace.name);
  }
  return out;
}

TEST(Names, AreNumbersOfLayersOfOneModel) {
  EXPECT_THAT(names(layers()), ElementsAre("2", "10", "1"));
}

TEST(Names, AreThoseOfFilesWhereLayersAreNotOfOneModel) {
  const auto named = [](const auto& change) {
    std::vector<TraceResult> traces = layers();
    change(traces);
    name_traces(traces);
    return names(traces);
  };
  const auto files = ElementsAre("layer_2", "layer_10", "layer_1");
  EXPECT_THAT(named([](auto& t) { t[1].shape.heads = 8; }), files);
  EXPECT_THAT(named([](auto& t) { t[1].model = "another"; }), files);
  EXPECT_THAT(named([](auto& t) { t[1].layer = "2"; }), files);
  EXPECT_THAT(named([](auto& t) { t[1].layer = "books"; }), files);
}

TEST(Names, AreWholePathsWhereFilesHaveOneName) {
  std::vector<TraceResult> traces = layers();
  traces[0].file = "a/t.safetensors";
  traces[1].file = "b/t.safetensors";
  traces[0].layer = "t";
  name_traces(traces);
  EXPECT_THAT(names(traces),
              ElementsAre("a/t.safetensors", "b/t.safetensors", "some/layer_1.safetensors"));
}

TEST(Names, AreSortedByTheirNumbers) {
  EXPECT_THAT(names(by_name(layers())), ElementsAre("1", "2", "10"));
  std::vector<TraceResult> traces = layers();
  traces[0].model = "another";
  name_traces(traces);
  EXPECT_THAT(names(by_name(traces)), ElementsAre("layer_1", "layer_2", "layer_10"));
}

TEST(OverallResult, HasMeansAndTheWorstTrace) {
  const std::vector<Overall> indexers = overall(layers());
  ASSERT_EQ(indexers.size(), 3);
  EXPECT_TRUE(indexers[0].dense);
  EXPECT_FALSE(indexers[1].dense);
  EXPECT_DOUBLE_EQ(*indexers[1].recall, 0.98);
  EXPECT_EQ(indexers[2].worst->trace, "10");
  EXPECT_EQ(indexers[2].worst->recall, 0.94);
  EXPECT_DOUBLE_EQ(*indexers[0].seconds, 110e-6);
  EXPECT_DOUBLE_EQ(*indexers[0].speed, 1);
  EXPECT_DOUBLE_EQ(*indexers[2].speed, 4.4);
  EXPECT_EQ(indexers[1].cost.bytes, 400);
  EXPECT_FALSE(indexers[1].attention);
}

TEST(OverallResult, LeavesOutTracesWithoutRecall) {
  std::vector<TraceResult> traces = layers();
  for (IndexerResult& indexer : traces[1].indexers) {
    indexer.recall.reset();
  }
  const std::vector<Overall> indexers = overall(traces);
  EXPECT_EQ(indexers[2].rated, 2);
  EXPECT_DOUBLE_EQ(*indexers[2].recall, 0.99);
  EXPECT_EQ(indexers[2].worst->recall, 0.99);
}

TEST(Verdict, IsOfTheFastestIndexerThatIsGoodInEveryLayer) {
  EXPECT_EQ(verdict(overall(layers())),
            "fast: 2.2 × less indexer time than DSA, worst layer 2 keeps 97.0 % of DSA's set.");
}

TEST(Verdict, IsOfTheBestWorstLayerWhereNoneIsGood) {
  std::vector<TraceResult> traces = layers();
  traces[2].indexers[1].recall->mean = 0.5;
  EXPECT_EQ(verdict(overall(traces)),
            "faster: 4.4 × less indexer time than DSA, worst layer 10 keeps 94.0 % of DSA's set, "
            "the most of these indexers.");
}

TEST(Verdict, CountsWorkWhereThereAreNoTimes) {
  std::vector<TraceResult> traces = layers();
  for (TraceResult& trace : traces) {
    for (IndexerResult& indexer : trace.indexers) {
      indexer.query = {};
    }
  }
  EXPECT_EQ(verdict(overall(traces)),
            "fast: 4.0 × fewer keys × heads than DSA, worst layer 2 keeps 97.0 % of DSA's set.");
}

TEST(Verdict, SaysThatAnIndexerIsSlower) {
  std::vector<TraceResult> traces = layers();
  for (TraceResult& trace : traces) {
    trace.indexers.pop_back();
    trace.indexers[1].query.median = 220e-6;
  }
  EXPECT_EQ(verdict(overall(traces)),
            "fast: 2.0 × the indexer time of DSA, worst layer 2 keeps 97.0 % of DSA's set.");
}

TEST(Verdict, NamesOneTraceWithoutCallingItTheWorst) {
  std::vector<TraceResult> traces{layers().front()};
  EXPECT_THAT(verdict(overall(traces)), ::testing::HasSubstr("than DSA, layer 2 keeps 99.0 %"));
  traces.front().layer = "books";
  name_traces(traces);
  EXPECT_THAT(verdict(overall(traces)), ::testing::HasSubstr("than DSA, layer_2 keeps 99.0 %"));
}

TEST(Verdict, ComparesWithNothingWhereThereIsNoDsa) {
  std::vector<TraceResult> traces = layers();
  for (TraceResult& trace : traces) {
    trace.indexers.erase(trace.indexers.begin());
  }
  EXPECT_EQ(verdict(overall(traces)), "fast: worst layer 2 keeps 97.0 % of DSA's set.");
}

TEST(Verdict, IsEmptyWhereThereIsNothingToCompare) {
  std::vector<TraceResult> traces = layers();
  for (TraceResult& trace : traces) {
    for (IndexerResult& indexer : trace.indexers) {
      indexer.recall.reset();
    }
  }
  EXPECT_EQ(verdict(overall(traces)), "");
}

}  // namespace
}  // namespace misa::cli
