// SPDX-License-Identifier: Apache-2.0
// The three output formats of a comparison, for one made by hand.
#include "report.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cctype>
#include <cstddef>
#include <nlohmann/json.hpp>
#include <string>
#include <string_view>
#include <vector>

namespace misa::cli {
namespace {

using ::testing::HasSubstr;
using ::testing::Not;

Comparison sample() {
  TraceResult trace;
  trace.file = "layers/</script><b>\"3\".safetensors";
  trace.shape = {96, 64, 128, 16384, DType::bf16, DType::e4m3};
  trace.long_rows = 90;
  trace.attention_bound = 0.96;
  trace.indexers.push_back({"dsa",
                            "DSA",
                            Summary{1, 1, 1},
                            AttentionKept{0.94, 1},
                            {5e-4, 4e-4, 6e-4, 1e-5, 5},
                            {1048576, 4325376},
                            2500000,
                            IndexerConfig::dsa(1024)});
  trace.indexers.push_back({"misa",
                            "MISA 8",
                            Summary{0.785, 0.7, 0.5},
                            AttentionKept{0.47, 0.5},
                            {1e-4, 9e-5, 2e-4, 2.5e-6, 5},
                            {132096, 4333568},
                            640,
                            IndexerConfig::misa(1024)});
  trace.sweeps = {
      8,
      {{"pooled", std::vector<double>(64, 0.125)}},
      {{"MISA", {{1, 0.5}, {64, 1}}}},
      {{"DSA", {{8192, 2.5e-4}, {16384, 5e-4}}}, {"MISA 8", {{8192, 5e-5}, {16384, 1e-4}}}}};
  trace.sha256 = std::string(64, 'a');
  trace.name = "layer</script>";
  return {"0.1.0",
          "2026-11-30T12:00:00Z",
          "misa compare layers/*",
          {{"system", "Linux"}},
          "A processor",
          "reference",
          "double precision",
          2,
          5,
          1024,
          0.25,
          {trace}};
}

Comparison of_short_rows() {
  Comparison comparison = sample();
  TraceResult& trace = comparison.traces.front();
  trace.long_rows = 0;
  trace.attention_bound.reset();
  trace.sweeps.reset();
  for (IndexerResult& result : trace.indexers) {
    result.recall.reset();
    result.attention.reset();
  }
  return comparison;
}

TEST(ReportJson, HoldsEveryFigure) {
  const nlohmann::ordered_json json = to_json(sample());
  EXPECT_EQ(json.at("version"), "0.1.0");
  EXPECT_EQ(json.at("date"), "2026-11-30T12:00:00Z");
  EXPECT_EQ(json.at("command"), "misa compare layers/*");
  EXPECT_EQ(json.at("facts"), (nlohmann::ordered_json{{"system", "Linux"}}));
  EXPECT_EQ(json.at("verdict"),
            "MISA 8: 5.0 × less indexer time than DSA, layer</script> keeps 78.5 % of DSA's set, "
            "the most of these indexers.");
  const nlohmann::ordered_json& summary = json.at("summary").at(1);
  EXPECT_EQ(summary.at("label"), "MISA 8");
  EXPECT_EQ(summary.at("recall"), 0.785);
  EXPECT_EQ(summary.at("worst"),
            (nlohmann::ordered_json{{"trace", "layer</script>"}, {"recall", 0.785}}));
  EXPECT_EQ(summary.at("attention").at("of_dsa"), 0.5);
  EXPECT_EQ(summary.at("seconds_per_query"), 1e-4);
  EXPECT_EQ(summary.at("speed"), 5e-4 / 1e-4);
  EXPECT_EQ(json.at("processor"), "A processor");
  EXPECT_EQ(json.at("backend"), "reference");
  EXPECT_EQ(json.at("isa"), "double precision");
  EXPECT_EQ(json.at("threads"), 2);
  EXPECT_EQ(json.at("runs"), 5);
  EXPECT_EQ(json.at("top_k"), 1024);
  const nlohmann::ordered_json& trace = json.at("traces").at(0);
  EXPECT_EQ(trace.at("sha256"), std::string(64, 'a'));
  EXPECT_EQ(trace.at("name"), "layer</script>");
  EXPECT_EQ(trace.at("queries"), 96);
  EXPECT_EQ(trace.at("heads"), 64);
  EXPECT_EQ(trace.at("dim"), 128);
  EXPECT_EQ(trace.at("keys"), 16384);
  EXPECT_EQ(trace.at("q_dtype"), "bf16");
  EXPECT_EQ(trace.at("k_dtype"), "e4m3");
  EXPECT_EQ(trace.at("long_rows"), 90);
  EXPECT_EQ(trace.at("attention_bound"), 0.96);
  const nlohmann::ordered_json& misa = trace.at("indexers").at(1);
  EXPECT_EQ(misa.at("name"), "misa");
  EXPECT_EQ(misa.at("label"), "MISA 8");
  EXPECT_EQ(misa.at("settings").at("router"), "pooled");
  EXPECT_EQ(misa.at("settings").at("heads"), 8);
  EXPECT_EQ(misa.at("recall"),
            (nlohmann::ordered_json{{"mean", 0.785}, {"q05", 0.7}, {"min", 0.5}}));
  EXPECT_EQ(misa.at("attention"), (nlohmann::ordered_json{{"kept", 0.47}, {"of_dsa", 0.5}}));
  EXPECT_EQ(misa.at("seconds_per_query"),
            (nlohmann::ordered_json{
                {"median", 1e-4}, {"fastest", 9e-5}, {"slowest", 2e-4}, {"spread", 2.5e-6}}));
  EXPECT_EQ(misa.at("keys_x_heads"), 132096);
  EXPECT_EQ(misa.at("bytes_read"), 4333568);
  EXPECT_EQ(misa.at("workspace_bytes"), 640);
  const nlohmann::ordered_json& sweeps = trace.at("sweeps");
  EXPECT_EQ(sweeps.at("head_use_heads"), 8);
  EXPECT_EQ(sweeps.at("head_use").at(0).at("router"), "pooled");
  EXPECT_EQ(sweeps.at("head_use").at(0).at("share").size(), 64);
  EXPECT_EQ(sweeps.at("recall_by_heads").at(0).at("points").at(1),
            (nlohmann::ordered_json{{"x", 64}, {"y", 1}}));
  EXPECT_EQ(sweeps.at("time_by_keys").at(1).at("label"), "MISA 8");
}

TEST(ReportJson, IsNullWhereThereIsNothingToCompare) {
  const nlohmann::ordered_json json = to_json(of_short_rows());
  const nlohmann::ordered_json& trace = json.at("traces").at(0);
  EXPECT_TRUE(json.at("verdict").is_null());
  EXPECT_TRUE(json.at("summary").at(1).at("worst").is_null());
  EXPECT_TRUE(trace.at("sweeps").is_null());
  EXPECT_TRUE(trace.at("attention_bound").is_null());
  EXPECT_TRUE(trace.at("indexers").at(0).at("recall").is_null());
  EXPECT_TRUE(trace.at("indexers").at(0).at("attention").is_null());
}

TEST(Report, OneRunHasNoSpread) {
  Comparison comparison = sample();
  comparison.runs = 1;
  for (IndexerResult& result : comparison.traces.front().indexers) {
    result.query.spread.reset();
    result.query.runs = 1;
  }
  const nlohmann::ordered_json json = to_json(comparison);
  EXPECT_TRUE(json.at("summary").at(1).at("spread").is_null());
  EXPECT_TRUE(
      json.at("traces").at(0).at("indexers").at(1).at("seconds_per_query").at("spread").is_null());
  EXPECT_THAT(to_text(comparison), Not(HasSubstr(" 0.0 ")));
}

TEST(ReportJson, WarnsOfABusyMachine) {
  Comparison comparison = sample();
  EXPECT_EQ(to_json(comparison).at("waited_for_processor"), 0.25);
  EXPECT_EQ(to_json(comparison).at("warning"), busy_warning(0.25));
  comparison.waited = 0;
  EXPECT_TRUE(to_json(comparison).at("warning").is_null());
  comparison.waited.reset();
  EXPECT_TRUE(to_json(comparison).at("waited_for_processor").is_null());
}

TEST(ReportText, SaysEveryFigure) {
  const std::string text = to_text(sample());
  for (const char* figure :
       {"A processor · reference (double precision), 2 threads · medians of 5 runs",
        "share of DSA's top 1024", "16 384 keys · 64 heads × 128 · 96 queries · e4m3 keys",
        "78.5 %", "70.0 %", "50.0 %", "47.0 %", "100.0", "2.5", "5.0×", "132 096", "4.3 MB",
        "90 of 96 queries see more than 1024 keys", "hold 96.0 %"}) {
    EXPECT_THAT(text, HasSubstr(figure));
  }
}

// 12 layers, of which the first has the number 11 and the last 0.
Comparison of_layers() {
  Comparison comparison = sample();
  const TraceResult trace = comparison.traces.front();
  comparison.traces.clear();
  for (int layer = 11; layer >= 0; --layer) {
    comparison.traces.push_back(trace);
    comparison.traces.back().name = std::to_string(layer);
    comparison.traces.back().indexers[1].recall->mean = 0.95 - 0.01 * layer;
  }
  return comparison;
}

TEST(ReportText, HasARowALayer) {
  const std::string text = to_text(of_layers());
  EXPECT_THAT(text, HasSubstr("12 traces · 16 384 keys · 64 heads × 128 · 96 queries · e4m3 keys"));
  EXPECT_THAT(text, HasSubstr("recall                       DSA    MISA 8\n"
                              "  layer 0                  100.0 %    95.0 %\n"
                              "  layer 1                  100.0 %    94.0 %\n"));
  EXPECT_THAT(text, HasSubstr("  layer 10                 100.0 %    85.0 %\n"
                              "  layer 11                 100.0 %    84.0 %\n"
                              "\n"
                              "  mean                     100.0 %    89.5 %\n"
                              "  worst                    100.0 %    84.0 %\n"
                              "  attention kept            94.0 %    47.0 %\n"
                              "    of DSA's               100.0 %    50.0 %\n"
                              "  µs a query                 500.0     100.0\n"
                              "    ±                         10.0       2.5\n"
                              "  speed vs DSA                1.0×      5.0×\n"));
  EXPECT_THAT(text, HasSubstr("1080 of 1152 queries see more than 1024 keys"));
  EXPECT_THAT(text, HasSubstr("\nMISA 8: 5.0 × less indexer time than DSA, worst layer 11 keeps "
                              "84.0 % of DSA's set"));
}

TEST(ReportText, HasNoRecallWhereAllRowsOfAllLayersAreShort) {
  Comparison comparison = of_short_rows();
  comparison.traces.push_back(comparison.traces.front());
  const std::string text = to_text(comparison);
  EXPECT_THAT(text, HasSubstr("No query sees more than 1024 keys"));
  EXPECT_THAT(text, ::testing::ContainsRegex("worst +– +–\n"));
}

TEST(ReportText, SaysThatAllRowsAreShort) {
  const std::string text = to_text(of_short_rows());
  EXPECT_THAT(text, HasSubstr("No query sees more than 1024 keys"));
  EXPECT_THAT(text, Not(HasSubstr("78.5")));
}

TEST(ReportText, EndsNoLineWithBlanks) {
  EXPECT_THAT(to_text(sample()), Not(HasSubstr(" \n")));
  EXPECT_THAT(to_text(of_layers()), Not(HasSubstr(" \n")));
}

// The content of the script element that holds the data.
std::string_view data_of(std::string_view page) {
  constexpr std::string_view open = R"(<script type="application/json" id="data">)";
  const std::size_t begin = page.find(open);
  EXPECT_NE(begin, std::string_view::npos);
  const std::size_t from = begin + open.size();
  return page.substr(from, page.find("</script>", from) - from);
}

TEST(ReportPage, HoldsTheComparisonWhateverFilesAreCalled) {
  EXPECT_EQ(nlohmann::ordered_json::parse(data_of(to_html(sample()))), to_json(sample()));
}

TEST(ReportPage, HasLayersByNumber) {
  const nlohmann::ordered_json data = nlohmann::ordered_json::parse(data_of(to_html(of_layers())));
  for (std::size_t i = 0; i < 12; ++i) {
    EXPECT_EQ(data.at("traces").at(i).at("name"), std::to_string(i));
  }
}

TEST(ReportPage, HoldsNamesThatAreNoUtf8) {
  Comparison comparison = sample();
  comparison.traces.front().file = "layer\xff.safetensors";
  const nlohmann::ordered_json data = nlohmann::ordered_json::parse(data_of(to_html(comparison)));
  EXPECT_EQ(data.at("traces").at(0).at("file"), "layer\uFFFD.safetensors");
}

TEST(ReportPage, NeedsNothingElse) {
  const std::string page = to_html(sample());
  EXPECT_THAT(page, Not(HasSubstr("http:")));
  EXPECT_THAT(page, Not(HasSubstr("https:")));
  EXPECT_THAT(page, Not(HasSubstr("src=")));
  EXPECT_THAT(page, Not(HasSubstr("<link")));
  EXPECT_THAT(page, Not(HasSubstr("@import")));
  EXPECT_THAT(page, Not(HasSubstr("url(")));
}

// Checks that every element of a page is closed in order. Void elements are not closed, and the
// content of scripts and styles is text.
void expect_well_formed(std::string_view page) {
  std::vector<std::string> open;
  std::size_t at = 0;
  while ((at = page.find('<', at)) != std::string_view::npos) {
    const std::size_t end = page.find('>', at);
    ASSERT_NE(end, std::string_view::npos) << page.substr(at, 40);
    const std::string_view tag = page.substr(at + 1, end - at - 1);
    at = end + 1;
    if (tag.starts_with("!DOCTYPE") || tag.ends_with("/")) {
      continue;
    }
    if (tag.starts_with('/')) {
      ASSERT_FALSE(open.empty()) << tag;
      ASSERT_EQ(tag.substr(1), open.back());
      open.pop_back();
      continue;
    }
    const std::string name(tag.substr(0, tag.find_first_of(" \n")));
    ASSERT_FALSE(name.empty() || std::isalpha(static_cast<unsigned char>(name[0])) == 0) << tag;
    open.push_back(name);
    if (name == "script" || name == "style") {
      at = page.find("</" + name + ">", at);
      ASSERT_NE(at, std::string_view::npos) << name << " is not closed";
    }
  }
  EXPECT_THAT(open, ::testing::IsEmpty());
}

TEST(ReportPage, IsWellFormed) {
  const std::string page = to_html(sample());
  EXPECT_TRUE(page.starts_with("<!DOCTYPE html>"));
  expect_well_formed(page);
}

}  // namespace
}  // namespace misa::cli
