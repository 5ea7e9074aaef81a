// SPDX-License-Identifier: Apache-2.0
// The program as a user sees it: what it writes and prints, and how it refuses bad input.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <limits>
#include <nlohmann/json.hpp>
#include <string>
#include <tuple>
#include <vector>

#include "misa/indexer.hpp"
#include "program.hpp"
#include "trace.hpp"

namespace misa::cli {
namespace {

using nlohmann::json;
using ::testing::AllOf;
using ::testing::ContainsRegex;
using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::StartsWith;

using Arguments = std::vector<std::string>;

Arguments operator+(Arguments a, const Arguments& b) {
  a.insert(a.end(), b.begin(), b.end());
  return a;
}

// Runs a command that has to succeed; returns stdout.
std::string done(const Arguments& arguments) {
  const Outcome outcome = run_misa(arguments);
  EXPECT_EQ(outcome.code, 0) << ::testing::PrintToString(arguments);
  EXPECT_EQ(without_warnings(outcome.err), "");
  return outcome.out;
}

// Checks that a command was refused with exit code 2 and one line on stderr; returns the line.
std::string refused(const Outcome& outcome) {
  EXPECT_EQ(outcome.code, 2) << outcome.err;
  EXPECT_EQ(outcome.out, "");
  EXPECT_THAT(outcome.err, StartsWith("misa: "));
  EXPECT_EQ(outcome.err.find('\n'), outcome.err.size() - 1) << outcome.err;
  return outcome.err.substr(0, outcome.err.size() - 1);
}

// Indexers small enough for the inputs below, as arguments and as configurations.
struct Named {
  std::string name;
  Arguments arguments;
  IndexerConfig config;
};

// How GoogleTest prints the parameter.
void PrintTo(const Named& named, std::ostream* out) { *out << named.name; }

std::vector<Named> indexers() {
  IndexerConfig fixed = IndexerConfig::misa(40, 2);
  fixed.router = Router::fixed;
  fixed.static_heads = {1, 6};
  IndexerConfig routed_hisa = IndexerConfig::hisa(40, 64, 3);
  routed_hisa.router = Router::self;
  routed_hisa.heads = 3;
  IndexerConfig small_blocks = IndexerConfig::misa(40, 3);
  small_blocks.block = 128;
  IndexerConfig by_length = IndexerConfig::automatic(40);
  by_length.dense_work = 8 * 150;
  return {{"dsa", {"--indexer", "dsa"}, IndexerConfig::dsa(40)},
          {"misa", {"--indexer", "misa", "--heads", "3", "--block", "128"}, small_blocks},
          {"dagger",
           {"--indexer", "misa-dagger", "--heads", "3", "--candidates", "90"},
           IndexerConfig::misa_dagger(40, 3, 90)},
          {"misa_r",
           {"--indexer", "misa-r", "--heads", "2", "--candidates", "80"},
           IndexerConfig::misa_r(40, 2, 80)},
          {"no_heads", {"--indexer", "misa-r", "--heads", "0"}, IndexerConfig::misa_r(40, 0)},
          {"hisa",
           {"--indexer", "hisa", "--hisa-block", "64", "--hisa-blocks", "3"},
           IndexerConfig::hisa(40, 64, 3)},
          {"routed_hisa",
           {"--indexer", "hisa", "--hisa-block", "64", "--hisa-blocks", "3", "--router", "self",
            "--heads", "3"},
           routed_hisa},
          {"auto", {"--indexer", "auto", "--dense-work", "1200"}, by_length},
          {"static", {"--indexer", "misa", "--router", "static", "--static-heads", "1,6"}, fixed}};
}

Arguments synth(const std::string& path, const Arguments& more = {}) {
  return Arguments{"synth", "-o", path, "--heads", "8", "--dim", "64"} + more;
}

class Select : public ::testing::TestWithParam<std::tuple<Named, std::string>> {};

// The program selects in chunks; with more queries than a chunk the result is the library's.
TEST_P(Select, WritesWhatTheLibrarySelects) {
  const auto& [indexer, backend] = GetParam();
  const Folder folder;
  done(synth(folder / "in", {"--queries", "270", "--keys", "280", "--kind", "structured"}));
  done(Arguments{"select", folder / "in", "-o", folder / "out", "--top-k", "40", "--scores",
                 "--backend", backend} +
       indexer.arguments);
  const Tensors out = read_tensors(folder / "out");
  const Trace trace(folder / "in");
  const Selected expected = select(Context({.backend = backend}), indexer.config, trace.inputs(),
                                   {.scores = true, .heads = true, .residual = true});
  EXPECT_EQ(out.at("indices").dtype, "I32");
  EXPECT_THAT(out.at("indices").shape, ElementsAre(270, 40));
  EXPECT_EQ(values_of<std::int32_t>(out.at("indices")), expected.indices);
  EXPECT_EQ(out.at("scores").dtype, "F32");
  EXPECT_EQ(values_of<float>(out.at("scores")), expected.scores);
  const bool routed = indexer.config.router != Router::all;
  EXPECT_EQ(out.contains("heads"), routed);
  if (routed) {
    EXPECT_EQ(out.at("heads").dtype, "I32");
    EXPECT_THAT(out.at("heads").shape, ElementsAre(270, indexer.config.heads));
    EXPECT_EQ(values_of<std::int32_t>(out.at("heads")), expected.heads);
  }
  EXPECT_EQ(out.contains("residual"), indexer.config.residual);
  if (indexer.config.residual) {
    EXPECT_EQ(out.at("residual").dtype, "F32");
    EXPECT_THAT(out.at("residual").shape, ElementsAre(270, 64));
    EXPECT_EQ(values_of<float>(out.at("residual")), expected.residual);
  }
}

// The same keys, shuffled among pages.
TEST_P(Select, PagedAndContiguousKeysGiveEqualIndices) {
  const Named& indexer = std::get<0>(GetParam());
  const std::string& backend = std::get<1>(GetParam());
  const Folder folder;
  const Arguments shape{"--sequences", "3",   "--queries", "2",
                        "--keys",      "333", "--dtype",   "F8_E4M3"};
  const auto selected = [&](const std::string& layout) {
    done(synth(folder / layout, shape + Arguments{"--layout", layout}));
    done(Arguments{"select", folder / layout, "-o", folder / "out", "--top-k", "40", "--backend",
                   backend} +
         indexer.arguments);
    return values_of<std::int32_t>(read_tensors(folder / "out").at("indices"));
  };
  EXPECT_EQ(selected("ragged"), selected("paged"));
}

INSTANTIATE_TEST_SUITE_P(, Select,
                         ::testing::Combine(::testing::ValuesIn(indexers()),
                                            ::testing::Values("reference", "cpu")),
                         [](const auto& param) {
                           return std::get<0>(param.param).name + "_" + std::get<1>(param.param);
                         });

TEST(SmokeProgram, SelectsWithoutScoresUnlessAsked) {
  const Folder folder;
  write_tensors(folder / "in", ragged_input());
  const std::string out = done({"select", folder / "in", "-o", folder / "out", "--top-k", "7"});
  EXPECT_THAT(out, AllOf(HasSubstr("top 7"), HasSubstr("3 queries"), HasSubstr("dsa")));
  EXPECT_EQ(read_tensors(folder / "out").size(), 1U);
  EXPECT_THAT(folder.names(), ElementsAre("in", "out"));
}

// More threads than the machine has change no result, and oneTBB prints no warning about them.
TEST(SmokeProgram, TakesAnyNumberOfThreads) {
  const Folder folder;
  write_tensors(folder / "in", ragged_input());
  const auto selected = [&](const char* threads) {
    done({"select", folder / "in", "-o", folder / "out", "--top-k", "7", "--threads", threads});
    return read_bytes(folder / "out");
  };
  EXPECT_EQ(selected("64"), selected("1"));
}

TEST(SmokeProgram, OneQueryOfNoKeys) {
  const Folder folder;
  Tensors tensors = ragged_input();
  tensors["ke"] = tensor<std::int32_t>("I32", {3}, {0, 2, 10});
  write_tensors(folder / "in", tensors);
  done({"select", folder / "in", "-o", folder / "out", "--top-k", "3", "--ordered"});
  EXPECT_THAT(values_of<std::int32_t>(read_tensors(folder / "out").at("indices")),
              ElementsAre(-1, -1, -1, 0, 1, -1, -1, -1, -1));
}

TEST(SmokeProgram, TellsJson) {
  const Folder folder;
  write_tensors(folder / "in", paged_input());
  const json summary = json::parse(done({"select", folder / "in", "-o", folder / "out", "--json",
                                         "--indexer", "misa", "--heads", "2", "--threads", "1"}));
  EXPECT_EQ(summary.at("indexer"), "misa");
  EXPECT_EQ(summary.at("settings").at("router"), "pooled");
  EXPECT_EQ(summary.at("queries"), 4);
  EXPECT_EQ(summary.at("settings").at("top_k"), 2048);
  EXPECT_EQ(summary.at("threads"), 1);
  EXPECT_EQ(summary.at("out_bytes"), std::filesystem::file_size(folder / "out"));

  const json file = json::parse(done({"inspect", folder / "out", "--json"}));
  EXPECT_EQ(file.at("tensors")[0].at("shape"), json({4, 2048}));
  EXPECT_EQ(file.at("tensors")[1],
            json::parse(R"({"name":"heads","dtype":"I32","shape":[4,2],"bytes":32})"));

  const json info = json::parse(done({"info", "--json"}));
  EXPECT_EQ(info.at("version"), version());
  EXPECT_EQ(info.at("backends").size(), backends().size());
  // Every fact that a report of a fault needs has a value.
  for (const char* fact : {"compiler", "build type", "highway", "onetbb", "fmt", "system",
                           "processors online", "processors allowed", "cpu quota", "cuda"}) {
    EXPECT_NE(info["facts"].value(fact, ""), "") << fact;
  }
}

TEST(SmokeProgram, InspectsForPeople) {
  const Folder folder;
  write_tensors(folder / "in", ragged_input());
  EXPECT_THAT(done({"inspect", folder / "in"}),
              ContainsRegex("q +F32 +3072 bytes +\\[3, 4, 64\\]"));
  EXPECT_THAT(done({"info"}), HasSubstr("reference"));
}

// One line per entry, whatever the names contain: spaces, escapes and line breaks.
TEST(SmokeProgram, InspectsNamesAndMetadataOfAnyKind) {
  const Folder folder;
  write_raw(folder / "in",
            R"({"a\n\u001b[2Jb":{"dtype":"F4","shape":[2],"data_offsets":[0,1]},)"
            R"("é\u0085\u2028\u202e":{"dtype":"F8_E5M2FNUZ","shape":[],"data_offsets":[1,2]},)"
            R"("__metadata__":{"k\r":"v\u009b\u007f","é":"\u0000"}})",
            "xy");
  const std::string text = done({"inspect", folder / "in"});
  EXPECT_EQ(std::count(text.begin(), text.end(), '\n'), 4);
  EXPECT_THAT(text, ContainsRegex(R"(a\\x0a\\x1b\[2Jb +F4 +1 bytes +\[2\])"));
  EXPECT_THAT(text, ContainsRegex(R"(é\\xc2\\x85\\xe2\\x80\\xa8\\xe2\\x80\\xae +F8_E5M2FNUZ)"));
  EXPECT_THAT(text, HasSubstr("\nk\\x0d: v\\xc2\\x9b\\x7f\n"));
  EXPECT_THAT(text, HasSubstr("\né: \\x00\n"));
  const json file = json::parse(done({"inspect", folder / "in", "--json"}));
  EXPECT_EQ(file.at("tensors")[0],
            json::parse(R"({"name":"a\n\u001b[2Jb","dtype":"F4","shape":[2],"bytes":1})"));
  EXPECT_EQ(file.at("metadata"), json::parse(R"({"k\r":"v\u009b\u007f","é":"\u0000"})"));
}

TEST(SmokeProgram, SynthIsAFunctionOfItsOptions) {
  const Folder folder;
  const auto bytes = [&](const Arguments& more) {
    done(synth(folder / "f", Arguments{"--keys", "70", "--queries", "3"} + more));
    return read_bytes(folder / "f");
  };
  EXPECT_EQ(bytes({}), bytes({}));
  EXPECT_NE(bytes({}), bytes({"--seed", "2"}));
  EXPECT_NE(bytes({}), bytes({"--kind", "structured"}));
  for (const char* dtype : {"F32", "BF16", "F8_E4M3"}) {
    bytes({"--dtype", dtype});
    const Tensors tensors = read_tensors(folder / "f");
    EXPECT_EQ(tensors.at("q").dtype, dtype);
    EXPECT_EQ(tensors.at("k").dtype, dtype);
  }
  bytes({"--sequences", "2"});
  const Tensors tensors = read_tensors(folder / "f");
  EXPECT_THAT(values_of<std::int32_t>(tensors.at("ks")), ElementsAre(0, 0, 0, 70, 70, 70));
  EXPECT_THAT(values_of<std::int32_t>(tensors.at("ke")), ElementsAre(68, 69, 70, 138, 139, 140));
}

TEST(SmokeProgram, SynthTakesSizesWithSuffixes) {
  const Folder folder;
  done(synth(folder / "f", {"--keys", "2K", "--queries", "1k"}));
  const Tensors tensors = read_tensors(folder / "f");
  EXPECT_EQ(tensors.at("k").shape.front(), 2048);
  EXPECT_EQ(tensors.at("q").shape.front(), 1024);
}

// How many of the positions that dsa selects an indexer selects too, as a share.
double share_of_dense(const std::string& kind, const std::string& indexer, int top_k) {
  const Folder folder;
  done({"synth", "-o", folder / "in", "--kind", kind, "--queries", "8", "--keys", "16384"});
  const auto rows = [&](const std::string& name) {
    done({"select", folder / "in", "-o", folder / "out", "--top-k", std::to_string(top_k),
          "--indexer", name});
    return values_of<std::int32_t>(read_tensors(folder / "out").at("indices"));
  };
  const std::vector<std::int32_t> dense = rows("dsa");
  const std::vector<std::int32_t> indices = rows(indexer);
  std::size_t found = 0;
  for (std::size_t i = 0; i < dense.size(); ++i) {
    const auto* row = &indices[i / top_k * top_k];
    found += std::find(row, row + top_k, dense[i]) != row + top_k ? 1 : 0;
  }
  return static_cast<double>(found) / static_cast<double>(dense.size());
}

// What --help says about the kinds of synthetic traces.
TEST(Program, StructuredTracesHideNeedlesFromEnergy) {
  EXPECT_LT(share_of_dense("structured", "misa", 8), 0.5);
  EXPECT_GT(share_of_dense("structured", "misa-r", 8), 0.5);
}

TEST(Program, ConcentratedTracesHideLoudHeadsFromALinearRow) {
  EXPECT_GT(share_of_dense("concentrated", "misa", 1024), 0.9);
  EXPECT_LT(share_of_dense("concentrated", "misa-r", 1024), 0.85);
}

TEST(Program, PassagesAskForAFilterOfBlocks) {
  EXPECT_GT(share_of_dense("passages", "hisa", 1024), 0.99);
  EXPECT_LT(share_of_dense("passages", "misa", 1024), 0.8);
  EXPECT_LT(share_of_dense("passages", "misa-r", 1024), 0.9);
}

TEST(SmokeProgram, HelpSaysWhatThereIs) {
  const std::string help = done({"--help"});
  for (const char* command :
       {"select", "compare", "bench", "info", "inspect", "synth", "calibrate"}) {
    EXPECT_THAT(help, HasSubstr(command));
    EXPECT_THAT(done({command, "--help"}), HasSubstr("--json"));
  }
  EXPECT_EQ(done({"--version"}), std::string(version()) + "\n");
}

// Arguments that are wrong whatever the input.
TEST(SmokeProgram, RefusesWrongArguments) {
  const Folder folder;
  write_tensors(folder / "in", ragged_input());
  const auto error = [&](const Arguments& more) {
    return refused(run_misa(Arguments{"select", folder / "in", "-o", folder / "out"} + more));
  };
  EXPECT_THAT(refused(run_misa({"select"})), HasSubstr("IN is required"));
  EXPECT_THAT(refused(run_misa({"select", folder / "in"})), HasSubstr("--output is required"));
  EXPECT_THAT(error({"--fast"}), HasSubstr("--fast"));
  EXPECT_THAT(error({"--indexer", "best"}),
              EndsWith("--indexer: expected dsa, misa, misa-dagger, misa-r, hisa, auto, got "
                       "'best'"));
  EXPECT_THAT(error({"--backend", "gpu"}), AllOf(HasSubstr("backend: expected auto, "),
                                                 HasSubstr("reference"), EndsWith("got 'gpu'")));
  EXPECT_THAT(error({"--threads", "-1"}), HasSubstr("--threads: expected"));
  for (const char* number : {"0", "-3", "many", "3.5", "99999999999999999999", ""}) {
    EXPECT_THAT(error({"--top-k", number}),
                EndsWith(std::string("--top-k: expected a whole number from 1 to 2147483647, K, M "
                                     "or G after it or not, got '") +
                         number + "'"));
  }
  EXPECT_THAT(error({"--indexer", "misa", "--heads", "0"}),
              EndsWith("heads: expected 1 to H = 4, got 0"));
  EXPECT_THAT(error({"--indexer", "misa", "--heads", "5"}),
              EndsWith("heads: expected 1 to H = 4, got 5"));
  EXPECT_THAT(error({"--indexer", "misa", "--heads", "2", "--block", "100"}),
              EndsWith("block: expected a multiple of 64, got 100"));
  EXPECT_THAT(error({"--indexer", "misa", "--heads", "2", "--candidates", "9", "--top-k", "10"}),
              HasSubstr("candidates: expected"));
  EXPECT_THAT(error({"--indexer", "hisa", "--hisa-blocks", "3"}),
              HasSubstr("filter_blocks: expected"));
  EXPECT_THAT(error({"--indexer", "misa", "--router", "all"}),
              AllOf(HasSubstr("--router: expected pooled, "), EndsWith("got 'all'")));
  const Arguments fixed{"--indexer", "misa", "--router", "static", "--static-heads"};
  EXPECT_THAT(error(fixed + Arguments{"1,4"}), EndsWith("static_heads[1]: expected 0 to 3, got 4"));
  EXPECT_THAT(error(fixed + Arguments{"1,1"}), EndsWith("expected distinct heads, got 1 again"));
  EXPECT_THAT(error(fixed + Arguments{"1,x"}), EndsWith("got 'x'"));
  EXPECT_THAT(error(fixed + Arguments{"1,2", "--heads", "3"}),
              HasSubstr("static_heads: expected 3"));
  EXPECT_THAT(folder.names(), ElementsAre("in"));
}

TEST(SmokeProgram, SelectsByTheSketchOfItsOptions) {
  const Folder folder;
  done(synth(folder / "in", {"--queries", "5", "--keys", "400", "--dtype", "F8_E4M3"}));
  const Trace trace(folder / "in");
  for (const std::string sketch : {"2", "4"}) {
    for (const std::string backend : {"reference", "cpu"}) {
      done({"select", folder / "in", "-o", folder / "out", "--indexer", "dsa", "--top-k", "40",
            "--candidates", "40", "--sketch", sketch, "--backend", backend});
      IndexerConfig config = IndexerConfig::dsa(40);
      config.candidates = 40;
      const Context context({.backend = backend});
      const Selected exact = select(context, config, trace.inputs(), {});
      config.sketch = std::stoi(sketch);
      const Selected expected = select(context, config, trace.inputs(), {});
      const Tensors out = read_tensors(folder / "out");
      EXPECT_EQ(values_of<std::int32_t>(out.at("indices")), expected.indices);
      EXPECT_NE(expected.indices, exact.indices);
    }
  }
}

// Options that the indexer would have to ignore.
TEST(SmokeProgram, RefusesContradictions) {
  const Folder folder;
  write_tensors(folder / "in", ragged_input());
  const auto error = [&](const Arguments& more) {
    return refused(run_misa(Arguments{"select", folder / "in", "-o", folder / "out"} + more));
  };
  EXPECT_THAT(error({"--heads", "2"}), HasSubstr("--heads: expected"));
  EXPECT_THAT(error({"--router", "self"}), HasSubstr("--router: expected"));
  EXPECT_THAT(error({"--block", "64"}), HasSubstr("--block: expected"));
  EXPECT_THAT(error({"--candidates", "4000"}), HasSubstr("--candidates: expected"));
  EXPECT_THAT(error({"--dense-work", "4000"}), HasSubstr("--dense-work: expected"));
  EXPECT_THAT(error({"--hisa-block", "64"}), HasSubstr("--hisa-block: expected"));
  EXPECT_THAT(error({"--hisa-blocks", "64"}), HasSubstr("--hisa-blocks: expected"));
  EXPECT_THAT(error({"--static-heads", "1"}), HasSubstr("--static-heads: expected"));
  EXPECT_THAT(error({"--indexer", "misa", "--router", "static"}),
              HasSubstr("--static-heads: expected"));
  EXPECT_THAT(error({"--indexer", "misa", "--router", "self", "--block", "64"}),
              HasSubstr("--block: expected the router pooled, got self"));
  EXPECT_THAT(error({"--indexer", "misa-dagger", "--candidates", "0"}),
              HasSubstr("--candidates: expected 1 or more"));
  EXPECT_THAT(error({"--sketch", "2", "--candidates", "0"}),
              HasSubstr("--candidates: expected 1 or more with --sketch"));
  EXPECT_THAT(error({"--sketch", "3", "--candidates", "4000"}), HasSubstr("--sketch"));
  EXPECT_THAT(error({"--indexer", "hisa", "--heads", "2"}), HasSubstr("--heads: expected"));
  EXPECT_THAT(error({"--indexer", "hisa", "--router", "self"}), HasSubstr("--heads: expected"));
  EXPECT_THAT(folder.names(), ElementsAre("in"));
}

struct BadInput {
  std::string name;
  Tensors (*valid)();
  std::function<void(Tensors&)> spoil;
  std::string message;
};

// How GoogleTest prints the parameter.
void PrintTo(const BadInput& input, std::ostream* out) { *out << input.name; }

template <class T>
std::function<void(Tensors&)> put(std::string name, std::string dtype,
                                  std::vector<std::int64_t> shape, std::vector<T> values = {}) {
  return [=](Tensors& tensors) {
    std::int64_t count = 1;
    for (const std::int64_t size : shape) {
      count *= size;
    }
    std::vector<T> all = values;
    all.resize(static_cast<std::size_t>(count));
    tensors[name] = tensor(dtype, shape, all);
  };
}

std::function<void(Tensors&)> without(const std::string& name) {
  return [=](Tensors& tensors) { tensors.erase(name); };
}

std::vector<BadInput> bad_inputs() {
  constexpr std::int32_t kHuge = std::numeric_limits<std::int32_t>::max();
  using Float = float;
  using Int = std::int32_t;
  using Byte = std::uint8_t;
  const auto& ragged = ragged_input;
  const auto& paged = paged_input;
  return {
      {"no_q", ragged, without("q"), "q: expected a tensor of this name, got none"},
      {"no_w", ragged, without("w"), "w: expected a tensor of this name, got none"},
      {"no_k", ragged, without("k"), "k: expected a tensor of this name, got none"},
      {"pages_only", ragged, put<Int>("block_table", "I32", {2, 3}),
       "block_table: expected none without cache, got I32 [2, 3]"},
      {"q_dtype", ragged, put<Byte>("q", "U8", {3, 4, 64}),
       "q: expected F32, BF16 or F8_E4M3, got U8 [3, 4, 64]"},
      {"q_rank", ragged, put<Float>("q", "F32", {12, 64}),
       "q: expected [T, H, D] = [any, any, any], got F32 [12, 64]"},
      {"q_dim", ragged, put<Float>("q", "F32", {3, 4, 96}), "q: expected D = 64 or 128, got 96"},
      {"q_no_heads", ragged, put<Float>("q", "F32", {3, 0, 64}), "q: expected H = 1 to 256, got 0"},
      {"q_heads", ragged, put<Float>("q", "F32", {1, 257, 64}),
       "q: expected H = 1 to 256, got 257"},
      {"w_dtype", ragged, put<Byte>("w", "U8", {3, 4}), "w: expected F32 [T, H], got U8 [3, 4]"},
      {"w_tokens", ragged, put<Float>("w", "F32", {2, 4}),
       "w: expected [T, H] = [3, 4], got F32 [2, 4]"},
      {"w_heads", ragged, put<Float>("w", "F32", {3, 5}),
       "w: expected [T, H] = [3, 4], got F32 [3, 5]"},
      {"q_half", ragged, put<std::uint16_t>("q", "F16", {3, 4, 64}),
       "q: expected F32, BF16 or F8_E4M3, got F16 [3, 4, 64]; F32 holds its values exactly"},
      {"k_dtype", ragged, put<Float>("k", "I32", {100, 64}),
       "k: expected F32, BF16 or F8_E4M3, got I32 [100, 64]"},
      {"k_dim", ragged, put<Float>("k", "F32", {50, 128}),
       "k: expected [L, D] = [any, 64], got F32 [50, 128]"},
      {"k_rank", ragged, put<Float>("k", "F32", {100, 64, 1}),
       "k: expected [L, D] = [any, 64], got F32 [100, 64, 1]"},
      {"no_scale", ragged, put<Byte>("k", "F8_E4M3", {100, 64}),
       "k_scale: expected F32 [L] with F8_E4M3 keys, got none"},
      {"scale", ragged, put<Float>("k_scale", "F32", {100}),
       "k_scale: expected none with F32 keys, got a tensor"},
      {"scale_length", ragged,
       [](Tensors& tensors) {
         put<Byte>("k", "F8_E4M3", {100, 64})(tensors);
         put<Float>("k_scale", "F32", {99})(tensors);
       },
       "k_scale: expected [L] = [100], got F32 [99]"},
      {"ks_dtype", ragged, put<std::int64_t>("ks", "I64", {3}),
       "ks: expected I32 [T], got I64 [3]"},
      {"ks_length", ragged, put<Int>("ks", "I32", {4}), "ks: expected [T] = [3], got I32 [4]"},
      {"ke_length", ragged, put<Int>("ke", "I32", {2}), "ke: expected [T] = [3], got I32 [2]"},
      {"ks_negative", ragged, put<Int>("ks", "I32", {3}, {0, -1, 0}),
       "ks[1]: expected 0 to L = 100, got -1"},
      {"ks_huge", ragged, put<Int>("ks", "I32", {3}, {0, 0, kHuge}),
       "ks[2]: expected 0 to L = 100, got 2147483647"},
      {"ke_negative", ragged, put<Int>("ke", "I32", {3}, {-5, 0, 0}),
       "ke[0]: expected 0 to L = 100, got -5"},
      {"ke_huge", ragged, put<Int>("ke", "I32", {3}, {80, 101, 90}),
       "ke[1]: expected 0 to L = 100, got 101"},
      {"attention", ragged, put<std::uint16_t>("attn_last32", "BF16", {32, 100}),
       "attn_last32: expected T = 32 or more, got 3"},
      {"attention_shape", ragged, put<std::uint16_t>("attn_last32", "BF16", {32, 99}),
       "attn_last32: expected [32, L] = [32, 100], got BF16 [32, 99]"},
      {"paged_k", paged, put<Float>("k", "F32", {100, 64}),
       "k: expected none beside cache, got F32 [100, 64]"},
      {"paged_bounds", paged, put<Int>("ke", "I32", {4}),
       "ke: expected none beside cache, got I32 [4]"},
      {"no_table", paged, without("block_table"),
       "block_table: expected a tensor of this name, got none"},
      {"no_lens", paged, without("context_lens"),
       "context_lens: expected a tensor of this name, got none"},
      {"paged_q_rank", paged, put<Float>("q", "F32", {4, 4, 64}),
       "q: expected [B, next_n, H, D] = [any, any, any, any], got F32 [4, 4, 64]"},
      {"no_next_n", paged,
       [](Tensors& tensors) {
         put<Float>("q", "F32", {2, 0, 4, 64})(tensors);
         put<Float>("w", "F32", {2, 0, 4})(tensors);
       },
       "q: expected next_n = 1 or more, got 0"},
      {"cache_dtype", paged, put<Byte>("cache", "I8", {5, 64, 68}),
       "cache: expected U8 [pages, page_size, D + 4], got I8 [5, 64, 68]"},
      {"cache_dim", paged, put<Byte>("cache", "U8", {5, 64, 132}),
       "cache: expected [pages, page_size, D + 4] = [any, any, 68], got U8 [5, 64, 132]"},
      {"cache_page", paged, put<Byte>("cache", "U8", {5, 48, 68}),
       "cache: expected a page size of 32, 64 or 128, got 48"},
      {"table_batch", paged, put<Int>("block_table", "I32", {3, 2}),
       "block_table: expected [B, max_pages] = [2, any], got I32 [3, 2]"},
      {"table_negative", paged, put<Int>("block_table", "I32", {2, 2}, {3, -1, 4, 0}),
       "block_table[0, 1]: expected 0 to 4 (the cache's pages), got -1"},
      {"table_beyond", paged, put<Int>("block_table", "I32", {2, 2}, {3, 1, 5, 0}),
       "block_table[1, 0]: expected 0 to 4 (the cache's pages), got 5"},
      {"lens_length", paged, put<Int>("context_lens", "I32", {3}),
       "context_lens: expected [B] = [2], got I32 [3]"},
      {"lens_beyond", paged, put<Int>("context_lens", "I32", {2}, {100, 129}),
       "context_lens[1]: expected 128 at most (max_pages * 64), got 129"},
      {"lens_huge", paged, put<Int>("context_lens", "I32", {2}, {kHuge, 1}),
       "context_lens[0]: expected 128 at most (max_pages * 64), got 2147483647"},
  };
}

class SmokeBadInput : public ::testing::TestWithParam<BadInput> {};

TEST_P(SmokeBadInput, IsToldInOneLine) {
  const Folder folder;
  Tensors tensors = GetParam().valid();
  GetParam().spoil(tensors);
  write_tensors(folder / "in", tensors);
  const Outcome outcome =
      run_misa({"select", folder / "in", "-o", folder / "out", "--top-k", "10"});
  EXPECT_EQ(refused(outcome), "misa: " + (folder / "in") + ": " + GetParam().message);
  EXPECT_THAT(folder.names(), ElementsAre("in"));
}

INSTANTIATE_TEST_SUITE_P(, SmokeBadInput, ::testing::ValuesIn(bad_inputs()),
                         [](const auto& param) { return param.param.name; });

TEST(SmokeProgram, RefusesFilesThatAreNone) {
  const Folder folder;
  const auto error = [&](const std::string& path) {
    const Arguments more{"-o", folder / "out", "--top-k", "10"};
    return refused(run_misa(Arguments{"select", path} + more));
  };
  EXPECT_THAT(error(folder / "in"), EndsWith("cannot be read: No such file or directory"));
  EXPECT_THAT(error("/dev/zero"), EndsWith("expected a regular file"));
  write_tensors(folder / "in", ragged_input());
  const std::string whole = read_bytes(folder / "in");
  for (const std::size_t bytes :
       {std::size_t{0}, std::size_t{5}, std::size_t{100}, whole.size() - 1}) {
    write_bytes(folder / "in", whole.substr(0, bytes));
    error(folder / "in");
  }
  // A name with a line break does not break the message into two lines.
  write_raw(folder / "in", R"({"two\nlines":{"dtype":"U7","shape":[1],"data_offsets":[0,1]}})",
            "x");
  EXPECT_THAT(error(folder / "in"), HasSubstr("'two\\x0alines': expected a dtype"));
  EXPECT_THAT(folder.names(), ElementsAre("in"));
}

TEST(SmokeProgram, RefusesOutputsThatCannotBeWritten) {
  const Folder folder;
  write_tensors(folder / "in", ragged_input());
  const auto error = [&](const std::string& path) {
    return refused(run_misa({"select", folder / "in", "-o", path}));
  };
  EXPECT_THAT(error(folder / "none/out"), EndsWith("cannot be written: No such file or directory"));
  EXPECT_THAT(error(folder / ""), EndsWith("expected a file name"));
  EXPECT_THAT(error("/dev/full"), HasSubstr("expected a regular file or none"));
  EXPECT_THAT(refused(run_misa({"synth", "-o", folder / "none/out"})), HasSubstr("none/out"));
  EXPECT_THAT(folder.names(), ElementsAre("in"));
}

TEST(SmokeProgram, RefusesToReplaceItsInput) {
  const Folder folder;
  const std::string in = folder / "in";
  write_tensors(in, ragged_input());
  const std::string before = read_bytes(in);
  const std::string link = folder / "link";
  std::filesystem::create_symlink(in, link);
  const std::vector<std::vector<std::string>> commands{{"select", in, "-o", in},
                                                       {"select", in, "-o", link},
                                                       {"compare", in, "--html", in},
                                                       {"calibrate", in, "-o", in}};
  for (const std::vector<std::string>& command : commands) {
    EXPECT_THAT(refused(run_misa(command)),
                HasSubstr("expected an output of another name than the input"));
    EXPECT_EQ(read_bytes(in), before);
  }
}

// A limit on the size of files simulates a full disk.
TEST(SmokeProgram, LeavesNothingOnAFullDisk) {
  const Folder folder;
  write_tensors(folder / "in", ragged_input());
  write_bytes(folder / "old", "old");
  const Surroundings full{.file_limit = 10000};  // less than 3 rows of 2048 indices take
  for (const char* name : {"new", "old"}) {
    EXPECT_THAT(refused(run_misa({"select", folder / "in", "-o", folder / name}, full)),
                EndsWith("cannot be written: File too large"));
  }
  EXPECT_THAT(refused(run_misa({"synth", "-o", folder / "new"}, full)), EndsWith("File too large"));
  EXPECT_THAT(folder.names(), ElementsAre("in", "old"));
  EXPECT_EQ(read_bytes(folder / "old"), "old");
}

}  // namespace
}  // namespace misa::cli
