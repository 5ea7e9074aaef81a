// SPDX-License-Identifier: Apache-2.0
// The commands that measure, run in this process on a trace that the test writes.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <nlohmann/json.hpp>
#include <random>
#include <span>
#include <string>
#include <utility>
#include <vector>

#include "commands.hpp"
#include "misa/error.hpp"
#include "misa/types.hpp"
#include "provenance.hpp"
#include "safetensors.hpp"
#include "timing.hpp"

namespace misa::cli {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

// Every row sees more keys than top_k, and fewer than MISA† re-ranks.
constexpr std::int64_t kQueries = 32;
constexpr std::int64_t kHeads = 16;
constexpr std::int64_t kDim = 64;
constexpr std::int64_t kKeys = 300;
constexpr const char* kTopK = "64";

// The two heads whose scores differ most from key to key.
constexpr std::int64_t kLoudHeads[] = {3, 11};

class Commands : public ::testing::Test {
 protected:
  void SetUp() override {
    const auto* test = ::testing::UnitTest::GetInstance()->current_test_info();
    folder_ = std::filesystem::path(::testing::TempDir()) /
              ("misa_commands_" + std::string(test->name()));
    std::filesystem::remove_all(folder_);
    std::filesystem::create_directories(folder_);
  }
  void TearDown() override { std::filesystem::remove_all(folder_); }

  [[nodiscard]] std::string path(const std::string& name) const { return folder_ / name; }

  // Random queries and keys; if there is attention, it is uniform.
  std::string write_trace(bool attention) const {
    std::mt19937_64 random(1);
    std::normal_distribution<float> normal;
    const auto values = [&](std::int64_t count) {
      std::vector<float> out(static_cast<std::size_t>(count));
      for (float& value : out) {
        value = normal(random);
      }
      return out;
    };
    std::vector<float> q = values(kQueries * kHeads * kDim);
    for (std::int64_t t = 0; t < kQueries; ++t) {
      for (const std::int64_t head : kLoudHeads) {
        for (std::int64_t d = 0; d < kDim; ++d) {
          q[static_cast<std::size_t>((t * kHeads + head) * kDim + d)] *= 100;
        }
      }
    }
    const std::vector<float> w(kQueries * kHeads, 1.0F);
    const std::vector<float> k = values(kKeys * kDim);
    const std::vector<std::uint16_t> weights(32 * kKeys, float_to_bf16(1));

    const auto info = [](std::string name, std::string dtype, std::vector<std::int64_t> shape,
                         std::uint64_t bytes) {
      return TensorInfo{std::move(name), std::move(dtype), std::move(shape), 0, bytes};
    };
    const auto bytes = [](const auto& tensor) { return std::as_bytes(std::span(tensor)); };
    std::vector<TensorInfo> tensors{info("q", "F32", {kQueries, kHeads, kDim}, bytes(q).size()),
                                    info("w", "F32", {kQueries, kHeads}, bytes(w).size()),
                                    info("k", "F32", {kKeys, kDim}, bytes(k).size())};
    if (attention) {
      tensors.push_back(info("attn_last32", "BF16", {32, kKeys}, bytes(weights).size()));
    }
    const std::string file = path("trace.safetensors");
    SafetensorsWriter writer(file, tensors, {{"model", "made up"}, {"layer", "5"}});
    writer.append("q", bytes(q));
    writer.append("w", bytes(w));
    writer.append("k", bytes(k));
    if (attention) {
      writer.append("attn_last32", bytes(weights));
    }
    writer.commit();
    return file;
  }

  // What the program prints.
  static std::string run(std::vector<std::string> arguments) {
    CLI::App app;
    add_compare(app);
    add_bench(app);
    add_calibrate(app);
    add_synth(app);
    std::reverse(arguments.begin(), arguments.end());
    ::testing::internal::CaptureStdout();
    try {
      app.parse(arguments);
    } catch (...) {
      ::testing::internal::GetCapturedStdout();
      throw;
    }
    return ::testing::internal::GetCapturedStdout();
  }

  [[nodiscard]] std::vector<std::string> files() const {
    std::vector<std::string> names;
    for (const auto& entry : std::filesystem::directory_iterator(folder_)) {
      names.push_back(entry.path().filename());
    }
    return names;
  }

 private:
  std::filesystem::path folder_;
};

std::string content(const std::string& file) {
  std::ifstream stream(file, std::ios::binary);
  return {std::istreambuf_iterator<char>(stream), {}};
}

TEST_F(Commands, CompareJsonHasItsSchema) {
  const std::string file = write_trace(true);
  const json out = json::parse(run({"compare", file, "--top-k", kTopK, "--runs", "2", "--json"}));
  for (const char* text :
       {"version", "date", "command", "processor", "backend", "isa", "verdict"}) {
    EXPECT_TRUE(out.at(text).is_string()) << text;
  }
  EXPECT_GE(out.at("threads"), 1);
  EXPECT_EQ(out.at("runs"), 2);
  EXPECT_EQ(out.at("top_k"), 64);
  ASSERT_EQ(out.at("traces").size(), 1);
  const json& trace = out.at("traces").at(0);
  EXPECT_EQ(trace.at("file"), file);
  EXPECT_EQ(trace.at("sha256"), sha256_of(file));
  EXPECT_EQ(trace.at("name"), "5");
  EXPECT_EQ(out.at("facts").at("processor"), out.at("processor"));
  EXPECT_EQ(out.at("summary").size(), trace.at("indexers").size());
  EXPECT_EQ(trace.at("model"), "made up");
  EXPECT_EQ(trace.at("queries"), kQueries);
  EXPECT_EQ(trace.at("heads"), kHeads);
  EXPECT_EQ(trace.at("dim"), kDim);
  EXPECT_EQ(trace.at("keys"), kKeys);
  EXPECT_EQ(trace.at("q_dtype"), "f32");
  EXPECT_EQ(trace.at("k_dtype"), "f32");
  EXPECT_EQ(trace.at("long_rows"), kQueries);
  EXPECT_TRUE(trace.at("sweeps").is_null());

  std::vector<std::string> names;
  for (const json& indexer : trace.at("indexers")) {
    names.push_back(indexer.at("name"));
    EXPECT_TRUE(indexer.at("label").is_string());
    const json& recall = indexer.at("recall");
    EXPECT_GE(recall.at("min"), 0);
    EXPECT_LE(recall.at("min"), recall.at("q05"));
    EXPECT_LE(recall.at("min"), recall.at("mean"));
    EXPECT_LE(recall.at("mean"), 1);
    const json& seconds = indexer.at("seconds_per_query");
    EXPECT_GT(seconds.at("fastest"), 0);
    EXPECT_LE(seconds.at("fastest"), seconds.at("median"));
    EXPECT_LE(seconds.at("median"), seconds.at("slowest"));
    EXPECT_GT(indexer.at("keys_x_heads"), 0);
    EXPECT_GT(indexer.at("bytes_read"), 0);
    EXPECT_TRUE(indexer.at("workspace_bytes").is_number_unsigned());
  }
  EXPECT_THAT(names, ElementsAre("dsa", "misa", "misa-dagger", "hisa", "misa-r", "misa-r:h=3:m=2k",
                                 "misa-r:h=3:m=4k", "auto"));
}

TEST_F(Commands, CompareFindsWhatIsDsaByDefinition) {
  const json out =
      json::parse(run({"compare", write_trace(false), "--top-k", kTopK, "--runs", "1", "--indexers",
                       "dsa,misa-dagger,misa:h=16,auto,misa:h=1", "--json"}));
  const json& indexers = out.at("traces").at(0).at("indexers");
  // DSA itself, every key re-ranked, every head routed, and rows within dense_work.
  for (const std::size_t same : {0, 1, 2, 3}) {
    EXPECT_EQ(indexers.at(same).at("recall").at("min"), 1);
  }
  EXPECT_LT(indexers.at(4).at("recall").at("mean"), 1);
}

TEST_F(Commands, CompareWeighsTheAttentionThatTheFileCarries) {
  const json out = json::parse(run({"compare", write_trace(true), "--top-k", kTopK, "--runs", "1",
                                    "--indexers", "dsa,misa:h=1", "--json"}));
  // All positions weigh the same, so any 64 of n hold 64 / n, whatever was selected.
  double kept = 0;
  for (std::int64_t t = 0; t < kQueries; ++t) {
    kept += 64.0 / static_cast<double>(kKeys - kQueries + t + 1) / kQueries;
  }
  const json& trace = out.at("traces").at(0);
  // A mean of 32 doubles.
  EXPECT_NEAR(trace.at("attention_bound").get<double>(), kept, 32 * 0x1p-52);
  for (const json& indexer : trace.at("indexers")) {
    EXPECT_NEAR(indexer.at("attention").at("kept").get<double>(), kept, 32 * 0x1p-52);
    EXPECT_NEAR(indexer.at("attention").at("of_dsa").get<double>(), 1, 64 * 0x1p-52);
  }
}

TEST_F(Commands, CompareWithoutRunsTellsRecallAlone) {
  const std::string file = write_trace(false);
  const auto compared = [&](const char* runs) {
    return json::parse(run({"compare", file, "--top-k", kTopK, "--indexers", "dsa,misa:h=2",
                            "--json", "--runs", runs}));
  };
  const json timed = compared("1");
  const json untimed = compared("0");
  for (const std::size_t i : {0, 1}) {
    const json& indexer = untimed.at("traces").at(0).at("indexers").at(i);
    const json& beside = timed.at("traces").at(0).at("indexers").at(i);
    EXPECT_TRUE(indexer.at("seconds_per_query").is_null());
    EXPECT_TRUE(beside.at("seconds_per_query").is_object());
    for (const char* same : {"recall", "keys_x_heads", "workspace_bytes"}) {
      EXPECT_EQ(indexer.at(same), beside.at(same)) << same;
    }
  }
  EXPECT_THAT(run({"compare", file, "--top-k", kTopK, "--indexers", "dsa", "--runs", "0"}),
              ::testing::ContainsRegex("not timed(.|\n)*"
                                       "DSA +100.0 % +100.0 % +100.0 % +– +– +–"));
}

TEST_F(Commands, CompareWithoutRunsMakesAPageWithoutTimes) {
  const std::string page = path("report.html");
  const json out = json::parse(run({"compare", write_trace(false), "--top-k", kTopK, "--runs", "0",
                                    "--indexers", "dsa,misa", "--html", page, "--json"}));
  const json& trace = out.at("traces").at(0);
  EXPECT_TRUE(trace.at("indexers").at(0).at("seconds_per_query").is_null());
  EXPECT_EQ(trace.at("sweeps").at("recall_by_heads").size(), 2);
  EXPECT_TRUE(trace.at("sweeps").at("time_by_keys").empty());
  EXPECT_THAT(content(page), HasSubstr(R"("time_by_keys":[])"));
}

TEST_F(Commands, CompareWithoutAttentionSaysNothingOfIt) {
  const std::string file = write_trace(false);
  const json out = json::parse(
      run({"compare", file, "--top-k", kTopK, "--runs", "1", "--indexers", "dsa", "--json"}));
  EXPECT_TRUE(out.at("traces").at(0).at("attention_bound").is_null());
  EXPECT_TRUE(out.at("traces").at(0).at("indexers").at(0).at("attention").is_null());
  EXPECT_THAT(run({"compare", file, "--top-k", kTopK, "--runs", "1", "--indexers", "dsa"}),
              ::testing::Not(HasSubstr("attention")));
}

TEST_F(Commands, CompareOfShortRowsSaysSo) {
  const std::string file = write_trace(true);
  const std::string page = path("report.html");
  const std::string text = run({"compare", file, "--top-k", "300", "--runs", "1", "--html", page});
  EXPECT_THAT(text, HasSubstr("No query sees more than 300 keys"));
  EXPECT_THAT(content(page), HasSubstr(R"("sweeps":null)"));
}

TEST_F(Commands, CompareTakesPagedKeys) {
  const std::string file = path("paged.safetensors");
  run({"synth", "-o", file, "--layout", "paged", "--dtype", "F8_E4M3", "--sequences", "2",
       "--queries", "2", "--keys", "200", "--heads", "8", "--dim", "64"});
  const json out =
      json::parse(run({"compare", file, "--top-k", "32", "--runs", "1", "--indexers",
                       "dsa,misa:h=8,misa-r:h=2", "--html", path("report.html"), "--json"}));
  const json& trace = out.at("traces").at(0);
  EXPECT_EQ(trace.at("long_rows"), 4);
  EXPECT_EQ(trace.at("indexers").at(1).at("recall").at("min"), 1);
  EXPECT_EQ(trace.at("sweeps").at("time_by_keys").at(0).at("points").at(0).at("x"), 25);
}

// On the reference, so that it runs on machines with CUDA devices too.
TEST_F(Commands, CompareTakesSketches) {
  const std::string file = path("quantised.safetensors");
  run({"synth", "-o", file, "--dtype", "F8_E4M3", "--queries", "4", "--keys", "700", "--heads", "8",
       "--dim", "64"});
  const json out = json::parse(run(
      {"compare", file, "--top-k", "32", "--runs", "1", "--backend", "reference", "--indexers",
       "misa-r:h=3:m=4k,misa-r:h=3:m=4k:sketch=2,dsa:m=700:sketch=4,dsa:m=32:sketch=2", "--json"}));
  const json& indexers = out.at("traces").at(0).at("indexers");
  EXPECT_EQ(indexers.at(1).at("label"), "MISA-R 3+1 m=128 2-bit");
  EXPECT_GT(indexers.at(1).at("recall").at("mean"), 0.5);
  EXPECT_LT(indexers.at(1).at("bytes_read"), indexers.at(0).at("bytes_read"));
  EXPECT_EQ(indexers.at(1).at("keys_x_heads"), indexers.at(0).at("keys_x_heads"));
  EXPECT_EQ(indexers.at(2).at("recall").at("min"), 1);  // every key re-ranked
  EXPECT_LT(indexers.at(3).at("recall").at("mean"), 1);
}

// Keys that are not F8_E4M3 have no sketch unless they are rounded first.
TEST_F(Commands, CompareRoundsToFp8) {
  const std::string file = write_trace(false);
  const std::vector<std::string> arguments{"compare", file, "--top-k",    kTopK,
                                           "--runs",  "1",  "--indexers", "dsa:m=2k:sketch=4",
                                           "--json"};
  try {
    run(arguments);
    FAIL() << "a sketch of keys that are not F8_E4M3";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(), HasSubstr("--indexers dsa:m=2k:sketch=4"));
    EXPECT_THAT(error.what(), HasSubstr("expected F8_E4M3 keys for a sketch; --fp8 rounds others"));
  }
  std::vector<std::string> rounded = arguments;
  rounded.emplace_back("--fp8");
  const json out = json::parse(run(rounded));
  const json& trace = out.at("traces").at(0);
  EXPECT_GT(trace.at("indexers").at(0).at("recall").at("mean"), 0.9);
}

TEST_F(Commands, CompareSweepsForThePage) {
  const std::string page = path("report.html");
  const json out = json::parse(run({"compare", write_trace(false), "--top-k", kTopK, "--runs", "1",
                                    "--indexers", "dsa,misa", "--html", page, "--json"}));
  const json& sweeps = out.at("traces").at(0).at("sweeps");
  EXPECT_EQ(sweeps.at("head_use_heads"), 8);
  ASSERT_EQ(sweeps.at("head_use").size(), 6);
  for (const json& use : sweeps.at("head_use")) {
    ASSERT_EQ(use.at("share").size(), kHeads);
    double sum = 0;
    for (const double share : use.at("share")) {
      sum += share;
    }
    EXPECT_NEAR(sum, 8, 8 * kQueries * 0x1p-52 * kHeads) << use.at("router");
  }
  for (const json& curve : sweeps.at("recall_by_heads")) {
    const json& points = curve.at("points");
    EXPECT_EQ(points.at(points.size() - 1), (json{{"x", kHeads}, {"y", 1.0}}));
  }
  EXPECT_EQ(sweeps.at("recall_by_heads").at(0).at("points").size(), 5);  // 1, 2, 4, 8, 16
  EXPECT_EQ(sweeps.at("recall_by_heads").at(1).at("points").size(), 6);  // and 0
  ASSERT_EQ(sweeps.at("time_by_keys").size(), 2);
  EXPECT_EQ(sweeps.at("time_by_keys").at(0).at("points").at(0).at("x"), kKeys / 8);
  EXPECT_THAT(content(page), HasSubstr(out.at("traces").at(0).at("file").get<std::string>()));
}

TEST_F(Commands, CompareLeavesNoPageBehindWhereItFails) {
  EXPECT_THROW(run({"compare", path("absent.safetensors"), "--html", path("report.html")}), Error);
  EXPECT_THAT(files(), ::testing::IsEmpty());
}

TEST_F(Commands, CompareNamesTheIndexerThatCannotRun) {
  const std::string file = write_trace(false);
  try {
    run({"compare", file, "--top-k", kTopK, "--indexers", "dsa,misa:h=17"});
    FAIL() << "17 of 16 heads were accepted";
  } catch (const Error& error) {
    EXPECT_THAT(error.what(),
                HasSubstr("--indexers misa:h=17: heads: expected 1 to H = 16, got 17"));
  }
}

TEST_F(Commands, CalibrateFindsTheHeadsThatTellKeysApart) {
  const std::string file = write_trace(false);
  for (const char* router : {"dispersion", "nonlinearity"}) {
    const std::string list = path("heads.json");
    const std::string text =
        run({"calibrate", file, "--router", router, "--heads", "2", "-o", list});
    EXPECT_THAT(text, HasSubstr("--indexer misa --router static --heads 2 --static-heads 3,11\n"));
    const json out = json::parse(content(list));
    EXPECT_EQ(out.at("router"), router);
    EXPECT_EQ(out.at("heads"), 2);
    const json& layer = out.at("layers").at(0);
    EXPECT_EQ(layer.at("layer"), "5");
    EXPECT_EQ(layer.at("file"), file);
    EXPECT_EQ(layer.at("static_heads"), json(kLoudHeads));
    EXPECT_EQ(layer.at("mean_values").size(), kHeads);
  }
}

TEST_F(Commands, CalibrateRefusesMoreHeadsThanThereAre) {
  EXPECT_THROW(run({"calibrate", write_trace(false), "--heads", "17"}), Error);
}

TEST_F(Commands, BenchJsonHasItsSchema) {
  const json out = json::parse(run({"bench", "--queries", "4", "--keys", "300", "--heads", "8",
                                    "--dim", "64", "--top-k", "32", "--dtype", "F8_E4M3", "--runs",
                                    "2", "--indexers", "dsa,misa-r:h=2:m=2k", "--json"}));
  EXPECT_EQ(out.at("queries"), 4);
  EXPECT_EQ(out.at("heads"), 8);
  EXPECT_EQ(out.at("dim"), 64);
  EXPECT_EQ(out.at("top_k"), 32);
  EXPECT_EQ(out.at("dtype"), "F8_E4M3");
  EXPECT_TRUE(out.at("backend").is_string());
  ASSERT_EQ(out.at("contexts").size(), 1);
  const json& only = out.at("contexts").at(0);
  EXPECT_EQ(only.at("keys"), 300);
  ASSERT_EQ(only.at("indexers").size(), 2);
  for (const json& indexer : only.at("indexers")) {
    for (const char* stage : {"seconds_first_stage", "seconds_step"}) {
      EXPECT_GT(indexer.at(stage).at("fastest"), 0);
      EXPECT_LE(indexer.at(stage).at("fastest"), indexer.at(stage).at("median"));
      EXPECT_LE(indexer.at(stage).at("median"), indexer.at(stage).at("slowest"));
    }
    EXPECT_GE(indexer.at("seconds_step").at("spread"), 0);
    EXPECT_GT(indexer.at("gflops"), 0);
  }
  const json& waited = only.at("waited_for_processor");
  EXPECT_EQ(out.at("warning").is_null(), waited.is_null() || waited < kBusy);
  // Query t of 4 sees 297 + t keys, all with every head.
  EXPECT_EQ(only.at("indexers").at(0).at("keys_x_heads"), 298.5 * 8);
  EXPECT_EQ(only.at("indexers").at(1).at("label"), "MISA-R 2+1 m=64");
}

TEST_F(Commands, BenchTimesSeveralContextsInEveryFormat) {
  const auto bench = [&](const std::string& format) {
    return run({"bench", "--queries", "2", "--keys", "200,1k", "--heads", "4", "--dim", "64",
                "--top-k", "32", "--runs", "1", "--backend", "reference", "--indexers",
                "dsa,misa:h=2", "--format", format});
  };
  // One run has no spread.
  EXPECT_THAT(bench("text"), AllOf(HasSubstr("\n200 keys\n"), HasSubstr("\n1024 keys\n"),
                                   HasSubstr(" · one run\n"), HasSubstr("   –   ")));
  EXPECT_THAT(bench("csv"),
              AllOf(StartsWith("indexer,keys,\"first stage, ms\","), HasSubstr("\nDSA,200,"),
                    HasSubstr("\nMISA 2,1024,"), HasSubstr(",,"), Not(HasSubstr("–"))));
  EXPECT_THAT(bench("markdown"), AllOf(StartsWith("| indexer | keys |"), HasSubstr("\n|---|--:|"),
                                       HasSubstr(" | – | "), HasSubstr("\n| MISA 2 | 200 | "),
                                       HasSubstr("\n| DSA | 1024 | ")));
}

TEST_F(Commands, BenchAndSynthRefuseSizesThatAreNone) {
  for (const char* size : {"", "K", "1.5K", "4T", "2G", "-4K"}) {
    for (const char* option : {"--keys", "--queries"}) {
      EXPECT_THROW(run({"bench", option, size}), CLI::Error) << option << " " << size;
      EXPECT_THROW(run({"synth", "-o", path("none"), option, size}), CLI::Error)
          << option << " " << size;
    }
    for (const char* command : {"bench", "compare", "select"}) {
      EXPECT_THROW(run({command, "--top-k", size}), CLI::Error) << command << " " << size;
    }
  }
  EXPECT_THROW(run({"bench", "--keys", "0"}), CLI::Error);
}

TEST_F(Commands, BenchTimesTheWholeStepOfASketch) {
  std::vector<std::string> arguments{"bench",
                                     "--queries",
                                     "2",
                                     "--keys",
                                     "300",
                                     "--heads",
                                     "8",
                                     "--dim",
                                     "64",
                                     "--top-k",
                                     "32",
                                     "--dtype",
                                     "F8_E4M3",
                                     "--runs",
                                     "1",
                                     "--backend",
                                     "reference",
                                     "--indexers",
                                     "dsa:m=2k:sketch=4"};
  EXPECT_THAT(run(arguments), HasSubstr("DSA m=64 4-bit             –"));
  arguments.emplace_back("--json");
  const json indexer = json::parse(run(arguments)).at("contexts").at(0).at("indexers").at(0);
  EXPECT_TRUE(indexer.at("seconds_first_stage").is_null());
  EXPECT_GT(indexer.at("seconds_step").at("median"), 0);
}

TEST_F(Commands, BenchTimesSelectionWhereTheBackendHasIt) {
  const std::vector<std::string> shape{"--queries",  "2",       "--keys", "100",      "--heads",
                                       "2",          "--top-k", "8",      "--runs",   "1",
                                       "--indexers", "dsa",     "--json", "--backend"};
  const auto selection = [&](const char* backend) {
    std::vector<std::string> arguments{"bench"};
    arguments.insert(arguments.end(), shape.begin(), shape.end());
    arguments.emplace_back(backend);
    return json::parse(run(arguments)).at("contexts").at(0).at("seconds_selection");
  };
  EXPECT_GT(selection("cpu").at("median"), 0);
  EXPECT_TRUE(selection("reference").is_null());
}

TEST_F(Commands, BenchRefusesMoreQueriesThanKeys) {
  EXPECT_THROW(run({"bench", "--queries", "9", "--keys", "8"}), Error);
}

}  // namespace
}  // namespace misa::cli
