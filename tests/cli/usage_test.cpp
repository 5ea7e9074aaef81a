// SPDX-License-Identifier: Apache-2.0
// What the program tells about its arguments: help, examples, and what is wrong with them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <cstdlib>
#include <filesystem>
#include <sstream>
#include <string>
#include <utility>
#include <vector>

#include "commands.hpp"
#include "program.hpp"

namespace misa::cli {
namespace {

using ::testing::HasSubstr;

using Arguments = std::vector<std::string>;

const Arguments kCommands{"select", "compare", "bench", "calibrate", "inspect", "synth", "info"};

// The program's commands, which are parsed and not run.
void add_commands(CLI::App& app) {
  for (const auto add :
       {add_select, add_compare, add_bench, add_calibrate, add_inspect, add_synth, add_info}) {
    add(app);
  }
  for (CLI::App* command : app.get_subcommands({})) {
    command->parse_complete_callback([] { throw CLI::Success(); });
  }
}

// The command lines in a help text, and its last line of all.
struct Help {
  Arguments examples;
  std::string last;
};

Help help_of(const Arguments& arguments) {
  const Outcome outcome = run_misa(arguments);
  EXPECT_EQ(outcome.code, 0);
  EXPECT_EQ(outcome.err, "");
  Help help;
  std::istringstream text(outcome.out);
  bool examples = false;  // whether their heading has been read
  for (std::string line; std::getline(text, line);) {
    while (line.ends_with('\\')) {
      std::string more;
      std::getline(text, more);
      line.replace(line.size() - 1, 1, more);
    }
    examples = examples || line.starts_with("Example") || line.starts_with("Try it:");
    if (examples && line.starts_with("  misa ")) {
      help.examples.push_back(line.substr(2));
    }
    if (!line.empty()) {
      help.last = line;
    }
  }
  return help;
}

TEST(Usage, HelpEndsWithExamplesOfTheCommand) {
  for (const std::string& command : kCommands) {
    const Help help = help_of({command, "--help"});
    ASSERT_FALSE(help.examples.empty()) << command;
    EXPECT_EQ(help.last, "  " + help.examples.back());
    for (const std::string& example : help.examples) {
      EXPECT_TRUE(example.starts_with("misa " + command + " ")) << example;
    }
  }
}

TEST(Usage, ExamplesAreAccepted) {
  std::vector<Arguments> pages{{"--help"}};
  for (const std::string& command : kCommands) {
    pages.push_back({command, "--help"});
  }
  for (const Arguments& page : pages) {
    for (const std::string& example : help_of(page).examples) {
      CLI::App app("", "misa");
      add_commands(app);
      EXPECT_THROW(app.parse(example, true), CLI::Success) << example;
      EXPECT_THAT(app.remaining(true), ::testing::IsEmpty()) << example;
    }
  }
}

TEST(Usage, ExamplesOfTheDocumentationAreAccepted) {
  for (const char* page : {"cli.md", "concepts.md"}) {
    std::istringstream text(read_bytes(std::filesystem::path(MISA_DOCS) / page));
    int examples = 0;
    for (std::string line; std::getline(text, line);) {
      if (line.starts_with("    misa ")) {
        CLI::App app("", "misa");
        add_commands(app);
        EXPECT_THROW(app.parse(line.substr(4), true), CLI::Success) << line;
        EXPECT_THAT(app.remaining(true), ::testing::IsEmpty()) << line;
        ++examples;
      }
    }
    EXPECT_GT(examples, 0) << page;
  }
}

TEST(Usage, NoArgumentsAreARequestForHelp) {
  const Outcome outcome = run_misa({});
  EXPECT_EQ(outcome.code, 0);
  EXPECT_EQ(outcome.err, "");
  EXPECT_EQ(outcome.out, run_misa({"--help"}).out);
}

// What a user may type, and the one line that is told.
TEST(Usage, SaysWhatWasMeant) {
  const std::string commands =
      "command: expected select, compare, bench, calibrate, inspect, synth, info or --help, got ";
  const std::pair<Arguments, std::string> cases[] = {
      {{"compair", "in"}, commands + "'compair', perhaps compare"},
      {{"choose"}, commands + "'choose'"},
      {{"--json"}, commands + "'--json'"},
      {{"--verson"}, commands + "'--verson', perhaps --version"},
      {{"--json", "info"}, "--json: expected after the command info, got before it"},
      {{"select", "in", "-o", "out", "--fast"},
       "--fast: expected an option that `misa select --help` lists"},
      {{"select", "in", "-o", "out", "--topk=3"},
       "--topk: expected an option that `misa select --help` lists, perhaps --top-k"},
      {{"select", "in", "--ouput", "out"},  // although --output is required
       "--ouput: expected an option that `misa select --help` lists, perhaps --output"},
      {{"calibrate", "in", "--out", "out"},
       "--out: expected an option that `misa calibrate --help` lists, perhaps --output"},
      {{"compare", "in", "--indexer", "dsa"},
       "--indexer: expected an option that `misa compare --help` lists, perhaps --indexers"},
      {{"synth", "-k", "3"}, "-k: expected an option that `misa synth --help` lists"},
      {{"inspect", "a", "b"},
       "arguments: expected those that `misa inspect --help` lists, got 'b' too"},
      {{"inspect"}, "FILE is required; `misa inspect --help` tells more"},
      {{"bench", "--dtype", "f16"}, "--dtype: expected F32, BF16 or F8_E4M3, got 'f16'"},
  };
  for (const auto& [arguments, message] : cases) {
    const Outcome outcome = run_misa(arguments);
    EXPECT_EQ(outcome.code, 2);
    EXPECT_EQ(outcome.out, "");
    EXPECT_EQ(outcome.err, "misa: " + message + "\n");
  }
}

// The names of dtypes that the program prints are those that it takes.
TEST(Usage, DtypesHaveTwoNames) {
  const Folder folder;
  const std::pair<std::string, std::string> names[] = {
      {"F32", "f32"}, {"BF16", "bf16"}, {"F8_E4M3", "e4m3"}};
  for (const auto& [name, printed] : names) {
    for (const std::string& dtype : {name, printed}) {
      EXPECT_EQ(run_misa({"synth", "-o", folder / dtype, "--dtype", dtype, "--queries", "1",
                          "--keys", "70"})
                    .code,
                0);
      EXPECT_EQ(read_tensors(folder / dtype).at("k").dtype, name);
      EXPECT_THAT(run_misa({"bench", "--dtype", dtype, "--queries", "1", "--keys", "70", "--top-k",
                            "8", "--heads", "2", "--runs", "1", "--indexers", "dsa"})
                      .out,
                  HasSubstr("· " + name + " ·"));
    }
    const std::string compared =
        run_misa({"compare", folder / name, "--top-k", "8", "--runs", "1", "--indexers", "dsa"})
            .out;
    EXPECT_THAT(compared, HasSubstr(printed + " keys"));
  }
}

// Every number of keys, queries or positions may be given as 2K.
TEST(Usage, SizesHaveSuffixes) {
  const Folder folder;
  ASSERT_EQ(run_misa({"synth", "-o", folder / "in", "--queries", "1", "--keys", "3K"}).code, 0);
  EXPECT_THAT(run_misa({"bench", "--queries", "1", "--keys", "3K", "--top-k", "2K", "--heads", "2",
                        "--runs", "1", "--indexers", "dsa"})
                  .out,
              HasSubstr("· top 2048\n"));
  EXPECT_THAT(run_misa({"compare", folder / "in", "--top-k", "2k", "--runs", "0"}).out,
              HasSubstr("DSA's top 2048 "));
  ASSERT_EQ(run_misa({"select", folder / "in", "-o", folder / "out", "--top-k", "2K"}).code, 0);
  EXPECT_EQ(read_tensors(folder / "out").at("indices").shape.back(), 2048);
}

// misa bench --peer runs the first misa-bench-peers of the path.
TEST(Usage, PeersAreTimedByAnotherCommand) {
  const Folder folder;
  const std::string path = std::getenv("PATH");
  const std::string program = folder / "misa-bench-peers";
  write_bytes(program, "#!/bin/sh\necho \"$@\"\nexit 3\n");
  std::filesystem::permissions(program, std::filesystem::perms::owner_all);
  ::setenv("PATH", (folder / "" + ":" + path).c_str(), 1);
  const Outcome found = run_misa({"bench", "--peer", "torch,ggml", "--keys", "4K", "--top-k", "1K",
                                  "--runs", "3", "--indexers", "dsa,misa", "--json"});
  const Outcome twice = run_misa({"bench", "--peer", "torch", "--keys", "4K,8K"});
  ::setenv("PATH", (folder / "none").c_str(), 1);
  const Outcome lacking = run_misa({"bench", "--peer", "torch"});
  ::setenv("PATH", path.c_str(), 1);
  EXPECT_EQ(found.code, 3);
  EXPECT_EQ(found.out, "--peers torch ggml --misa " MISA_PROGRAM
                       " --queries 256 --heads 64 --keys 4096 --top-k 1024 --indexers dsa,misa "
                       "--rounds 3 --json\n");
  EXPECT_EQ(twice.code, 2);
  EXPECT_EQ(twice.err, "misa: --keys: expected one number with --peer, got 2\n");
  EXPECT_EQ(lacking.code, 2);
  EXPECT_THAT(lacking.err, HasSubstr("misa-bench-peers on the path, which `pip install .` brings"));
  for (const char* option : {"--dim", "--dtype", "--backend", "--format"}) {
    const Arguments arguments{"bench", "--peer", "torch", option,
                              option == std::string("--dim")      ? "64"
                              : option == std::string("--dtype")  ? "F32"
                              : option == std::string("--format") ? "csv"
                                                                  : "cpu"};
    EXPECT_EQ(run_misa(arguments).code, 2) << option;
  }
}

// An indexer that was not given is not told as one that was.
TEST(Usage, DefaultIndexersAreToldAsSuch) {
  const Folder folder;
  const std::string in = folder / "in";
  EXPECT_EQ(run_misa({"synth", "-o", in, "--queries", "1", "--keys", "8600"}).code, 0);
  const std::pair<std::string, Arguments> commands[] = {
      {"compare", {in}}, {"bench", {"--queries", "1", "--keys", "8600"}}};
  for (const auto& [command, more] : commands) {
    Arguments arguments{command, "--top-k", "8500", "--runs", "1"};
    arguments.insert(arguments.end(), more.begin(), more.end());
    const std::string by_default = run_misa(arguments).err;
    EXPECT_THAT(by_default, HasSubstr("misa: misa-dagger (by default; --indexers names others): "));
    EXPECT_THAT(by_default, HasSubstr("at least top_k = 8500, got 8192"));
    arguments.insert(arguments.end(), {"--indexers", "misa-dagger"});
    EXPECT_THAT(run_misa(arguments).err, HasSubstr("misa: --indexers misa-dagger: "));
  }
}

}  // namespace
}  // namespace misa::cli
