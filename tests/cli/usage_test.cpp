// SPDX-License-Identifier: Apache-2.0
// What the program tells about its arguments: help, examples, and what is wrong with them.
#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
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
