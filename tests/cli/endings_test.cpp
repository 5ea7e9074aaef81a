// SPDX-License-Identifier: Apache-2.0
// How the program ends: with its documented exit code whatever its standard streams are, by the
// signal that it was sent, and without leaving a partly written file.
#include <fcntl.h>
#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <chrono>
#include <csignal>
#include <cstddef>
#include <functional>
#include <string>
#include <thread>
#include <vector>

#include "output_file.hpp"
#include "program.hpp"
#include "progress.hpp"

namespace misa::cli {
namespace {

using ::testing::AllOf;
using ::testing::ElementsAre;
using ::testing::EndsWith;
using ::testing::HasSubstr;
using ::testing::IsEmpty;
using ::testing::SizeIs;

using Arguments = std::vector<std::string>;

// The files of a command: its inputs and its output.
struct Files {
  Folder folder;
  std::string in = folder / "in";
  std::string many = folder / "many";  // so many tensors that inspect fills its output buffer
  std::string bad = folder / "bad";
  std::string out = folder / "out";

  Files() {
    write_tensors(in, ragged_input());
    Tensors tensors;
    for (int i = 0; i < 1000; ++i) {
      tensors[std::to_string(i)] = tensor<std::uint8_t>("U8", {1}, {0});
    }
    write_tensors(many, tensors);
    write_bytes(bad, "bad");
  }
};

struct Command {
  std::string name;
  int code;  // exit code with all streams open
  std::function<Arguments(const Files&)> arguments;
};

// How GoogleTest prints the parameter.
void PrintTo(const Command& command, std::ostream* out) { *out << command.name; }

std::vector<Command> commands() {
  const auto fixed = [](const Arguments& arguments) {
    return [=](const Files&) { return arguments; };
  };
  const Arguments tiny{"bench",  "--queries",  "2",        "--heads", "1",
                       "--keys", "64",         "--top-k",  "4",       "--runs",
                       "1",      "--indexers", "dsa,hisa", "--dim",   "64"};
  Arguments tiny_json = tiny;
  tiny_json.emplace_back("--json");
  std::vector<Command> list{
      {"version", 0, fixed({"--version"})},
      {"help", 0, fixed({"--help"})},
      {"info", 0, fixed({"info"})},
      {"info_json", 0, fixed({"info", "--json"})},
      {"inspect", 0,
       [](const Files& files) {
         return Arguments{"inspect", files.in};
       }},
      {"inspect_many", 0,
       [](const Files& files) {
         return Arguments{"inspect", files.many};
       }},
      {"inspect_json", 0,
       [](const Files& files) {
         return Arguments{"inspect", files.many, "--json"};
       }},
      {"select", 0,
       [](const Files& files) {
         return Arguments{"select", files.in, "-o", files.out};
       }},
      {"select_json", 0,
       [](const Files& files) {
         return Arguments{"select", files.in, "-o", files.out, "--json"};
       }},
      {"synth", 0,
       [](const Files& files) {
         return Arguments{"synth", "-o", files.out, "--keys", "99"};
       }},
      {"synth_json", 0,
       [](const Files& files) {
         return Arguments{"synth", "-o", files.out, "--keys", "99", "--json"};
       }},
      {"compare", 0,
       [](const Files& files) {
         return Arguments{"compare",    files.in, "--html", files.out,
                          "--indexers", "dsa",    "--runs", "1"};
       }},
      {"compare_json", 0,
       [](const Files& files) {
         return Arguments{"compare", files.in, "--json", "--indexers", "dsa", "--runs", "1"};
       }},
      {"calibrate", 0,
       [](const Files& files) {
         return Arguments{"calibrate", files.in, "-o", files.out, "--heads", "2"};
       }},
      {"calibrate_json", 0,
       [](const Files& files) {
         return Arguments{"calibrate", files.in, "--json", "--heads", "2"};
       }},
      {"bench", 0, fixed(tiny)},
      {"bench_json", 0, fixed(tiny_json)},
      {"no_command", 0, fixed({})},
      {"unknown_command", 2, fixed({"choose"})},
      {"unknown_option", 2, fixed({"info", "--fast"})},
      {"bad_number", 2, fixed({"bench", "--keys", "many"})},
      {"bad_combination", 2, fixed({"bench", "--queries", "9", "--keys", "8"})},
      {"no_file", 2,
       [](const Files& files) {
         return Arguments{"inspect", files.folder / "none"};
       }},
      {"bad_file", 2,
       [](const Files& files) {
         return Arguments{"compare", files.bad};
       }},
      {"no_output", 2,
       [](const Files& files) {
         return Arguments{"select", files.in, "-o", files.folder / "none/out"};
       }},
      {"no_memory", 2, fixed({"bench", "--queries", "2147483647", "--keys", "2147483647"})},
  };
  for (const char* name : {"select", "compare", "bench", "calibrate", "inspect", "synth", "info"}) {
    list.push_back({std::string("help_") + name, 0, fixed({name, "--help"})});
  }
  return list;
}

std::string reason(Stream stream) {
  return stream == Stream::closed ? "Bad file descriptor"
         : stream == Stream::full ? "No space left on device"
                                  : "Broken pipe";
}

class Endings : public ::testing::TestWithParam<Command> {};

TEST_P(Endings, AreTheDocumentedCodeWhateverTheStreamsAre) {
  const Files files;
  const Arguments arguments = GetParam().arguments(files);
  const auto run = [&](const Surroundings& surroundings) {
    Outcome outcome = run_misa(arguments, surroundings);
    outcome.err = without_warnings(outcome.err);
    EXPECT_EQ(outcome.signal, 0);
    for (const std::string& name : files.folder.names()) {
      EXPECT_FALSE(name.starts_with(".")) << name;
    }
    return outcome;
  };
  const Outcome given = run({});
  ASSERT_EQ(given.code, GetParam().code) << given.err;
  ASSERT_EQ(given.out.empty(), given.code != 0);
  ASSERT_EQ(given.err.empty(), given.code == 0);
  for (const Stream stream : {Stream::closed, Stream::full, Stream::broken}) {
    SCOPED_TRACE(reason(stream));
    const Outcome no_in = run({.in = stream});
    EXPECT_EQ(no_in.code, given.code);
    EXPECT_EQ(no_in.err, given.err);
    const Outcome no_err = run({.err = stream});
    EXPECT_EQ(no_err.code, given.code);
    EXPECT_EQ(no_err.out.empty(), given.out.empty());
    for (const std::vector<int>& ignored : {std::vector<int>{}, {SIGPIPE}}) {
      const Outcome no_out = run({.out = stream, .ignored = ignored});
      EXPECT_EQ(no_out.code, 2);
      EXPECT_EQ(no_out.err, given.code != 0
                                ? given.err
                                : "misa: stdout: cannot be written: " + reason(stream) + "\n");
      EXPECT_EQ(run({.in = stream, .out = stream, .err = stream, .ignored = ignored}).code, 2);
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, Endings, ::testing::ValuesIn(commands()),
                         [](const auto& param) { return param.param.name; });

// Where standard streams are closed, files that the program opens must not get their descriptors.
TEST(SmokeProgram, PrintsNothingIntoItsOutput) {
  const Files files;
  const Arguments arguments{"select", files.in, "-o", files.out, "--top-k", "7"};
  ASSERT_EQ(run_misa(arguments).code, 0);
  const std::string bytes = read_bytes(files.out);
  for (const Surroundings& surroundings :
       {Surroundings{.in = Stream::closed},
        {.out = Stream::closed},
        {.err = Stream::closed},
        {.in = Stream::closed, .out = Stream::closed, .err = Stream::closed}}) {
    std::filesystem::remove(files.out);
    EXPECT_EQ(run_misa(arguments, surroundings).signal, 0);
    EXPECT_EQ(read_bytes(files.out), bytes);
  }
}

// Waits until the folder holds more than `count` files. If the process ends before, the test fails
// by how it ended.
void wait_for_file(const Folder& folder, std::size_t count, pid_t child) {
  siginfo_t ended{};
  while (folder.names().size() <= count && ended.si_pid == 0) {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    ::waitid(P_PID, static_cast<id_t>(child), &ended, WEXITED | WNOHANG | WNOWAIT);
  }
}

// Starts a command that writes for a long time, and waits until its file exists.
pid_t start_writing(const Folder& folder, Surroundings surroundings = {}) {
  const pid_t child = start_misa(
      {"synth", "-o", folder / "out", "--keys", "10000000", "--dim", "64", "--dtype", "F8_E4M3"},
      surroundings);
  wait_for_file(folder, 0, child);
  return child;
}

// The signals that end a process by default, without SIGKILL, SIGPIPE and SIGXFSZ.
std::vector<int> ending_signals() {
  return {SIGHUP,  SIGINT,  SIGQUIT, SIGILL,    SIGTRAP,  SIGABRT,      SIGBUS,  SIGFPE,
          SIGUSR1, SIGSEGV, SIGUSR2, SIGALRM,   SIGTERM,  SIGSTKFLT,    SIGXCPU, SIGPROF,
          SIGIO,   SIGPWR,  SIGSYS,  SIGVTALRM, SIGRTMIN, SIGRTMIN + 1, SIGRTMAX};
}

class Signals : public ::testing::TestWithParam<int> {};

TEST_P(Signals, LeaveNothingAndEndTheProgram) {
  const Folder folder;
  const pid_t child = start_writing(folder);
  ::kill(child, GetParam());
  EXPECT_EQ(wait_for(child).signal, GetParam());
  EXPECT_THAT(folder.names(), IsEmpty());
}

TEST_P(Signals, StayIgnoredWhereTheyWere) {
  const Folder folder;
  const pid_t child = start_writing(folder, {.ignored = {GetParam()}});
  ::kill(child, GetParam());
  const int other = GetParam() == SIGTERM ? SIGINT : SIGTERM;
  ::kill(child, other);
  EXPECT_EQ(wait_for(child).signal, other);
  EXPECT_THAT(folder.names(), IsEmpty());
}

INSTANTIATE_TEST_SUITE_P(, Signals, ::testing::ValuesIn(ending_signals()),
                         [](const auto& param) { return "Signal" + std::to_string(param.param); });

TEST(Program, OutlivesSignalsOfPipesAndFileSizes) {
  const Folder folder;
  const pid_t child = start_writing(folder);
  ::kill(child, SIGPIPE);
  ::kill(child, SIGXFSZ);
  ::kill(child, SIGTERM);
  EXPECT_EQ(wait_for(child).signal, SIGTERM);
  EXPECT_THAT(folder.names(), IsEmpty());
}

// Any thread of the program may get the signals, and several may arrive at once.
TEST(Program, LeavesNothingWhenSignalsComeTogether) {
  const Files files;
  const std::size_t before = files.folder.names().size();
  for (int i = 0; i < 10; ++i) {
    const pid_t child = start_misa(
        {"compare", files.in, "--html", files.out, "--runs", "2147483647", "--indexers", "dsa"});
    wait_for_file(files.folder, before, child);
    const std::array<int, 4> signals{SIGTERM, SIGINT, SIGTERM, SIGHUP};
    for (const int signal : signals) {
      ::kill(child, signal);
    }
    EXPECT_THAT(signals, ::testing::Contains(wait_for(child).signal));
    EXPECT_THAT(files.folder.names(), SizeIs(before));
  }
}

// Whether the signal comes before, while or after a file is written and renamed, the file is
// complete or absent.
TEST(Program, LeavesAWholeFileOrNoneWheneverASignalComes) {
  const Folder folder;
  const Arguments arguments{"synth", "-o", folder / "out", "--keys", "1", "--queries", "1"};
  ASSERT_EQ(run_misa(arguments).code, 0);
  const std::string bytes = read_bytes(folder / "out");
  for (int i = 0; i < 200; ++i) {
    std::filesystem::remove(folder / "out");
    const pid_t child = start_misa(arguments);
    std::this_thread::sleep_for(std::chrono::microseconds(50 * i));
    ::kill(child, SIGTERM);
    const Outcome outcome = wait_for(child);
    EXPECT_TRUE(outcome.signal == SIGTERM || outcome.code == 0);
    for (const std::string& name : folder.names()) {
      EXPECT_EQ(name, "out");
      EXPECT_EQ(read_bytes(folder / name), bytes);
    }
  }
}

TEST(SmokeOutputFile, LeavesSignalsAsTheyWere) {
  const auto handler_of = [](int signal) {
    struct sigaction action {};
    ::sigaction(signal, nullptr, &action);
    return action.sa_handler;
  };
  const Folder folder;
  const auto handler = [](int) {};
  std::signal(SIGUSR1, handler);
  std::signal(SIGUSR2, SIG_IGN);
  {
    OutputFile file(folder / "f");
    EXPECT_NE(handler_of(SIGTERM), SIG_DFL);
    EXPECT_EQ(handler_of(SIGUSR1), +handler);
    EXPECT_EQ(handler_of(SIGUSR2), SIG_IGN);
    EXPECT_EQ(handler_of(SIGCHLD), SIG_DFL);
    file.commit();
  }
  EXPECT_EQ(handler_of(SIGTERM), SIG_DFL);
  EXPECT_EQ(handler_of(SIGUSR1), +handler);
  EXPECT_EQ(handler_of(SIGUSR2), SIG_IGN);
  std::signal(SIGUSR1, SIG_DFL);
  std::signal(SIGUSR2, SIG_DFL);
}

int open_terminal() {
  const int terminal = ::posix_openpt(O_RDWR | O_NOCTTY | O_CLOEXEC);
  EXPECT_GE(terminal, 0);
  EXPECT_EQ(::grantpt(terminal), 0);
  EXPECT_EQ(::unlockpt(terminal), 0);
  return terminal;
}

// What the program writes to the terminal next.
std::string drawn_on(int terminal) {
  std::array<char, 256> drawn{};
  const ssize_t length = ::read(terminal, drawn.data(), drawn.size());
  EXPECT_GT(length, 0);
  return {drawn.data(), static_cast<std::size_t>(std::max<ssize_t>(0, length))};
}

// Who waits for a long part of the work sees that it goes on.
TEST(Program, DrawsItsProgressAgainWithoutAnyThatIsNew) {
  const int terminal = open_terminal();
  const int before = ::dup(STDERR_FILENO);
  const int err = ::open(::ptsname(terminal), O_WRONLY | O_NOCTTY | O_CLOEXEC);
  ::dup2(err, STDERR_FILENO);
  {
    const Progress progress("working", 10);
    EXPECT_THAT(drawn_on(terminal), HasSubstr("working   0 %"));
    EXPECT_THAT(drawn_on(terminal), HasSubstr("working   0 %"));
  }
  ::dup2(before, STDERR_FILENO);
  for (const int file : {err, before, terminal}) {
    ::close(file);
  }
}

// Progress is shown on a terminal, which may be closed while the program runs.
TEST(Program, OutlivesTheTerminalThatShowsItsProgress) {
  const Folder folder;
  const int terminal = open_terminal();
  const pid_t child = start_misa({"synth", "-o", folder / "out", "--keys", "200000", "--dim", "64"},
                                 {.terminal = ::ptsname(terminal)});
  EXPECT_THAT(drawn_on(terminal), HasSubstr("synthesizing   0 %"));  // before any work is done
  ::close(terminal);
  EXPECT_EQ(wait_for(child).code, 0);
  EXPECT_THAT(folder.names(), ElementsAre("out"));
}

// Threads cannot be created at a limit on processes, or on memory that leaves no room for a stack.
TEST(Program, TellsOfThreadsThatCannotBeMade) {
  const Files files;
  const Arguments select{"select", files.in, "-o", files.out, "--threads"};
  const auto run = [&](Arguments arguments, const char* threads) {
    arguments.emplace_back(threads);
    return run_misa(arguments, {.no_threads = true});
  };
  // With one processor no thread is created.
  const int code = std::thread::hardware_concurrency() > 1 ? 2 : 0;
  for (const Arguments& arguments :
       {select,
        {"compare", files.in, "--html", files.out, "--indexers", "dsa", "--threads"},
        {"bench", "--queries", "2", "--keys", "64", "--indexers", "dsa", "--threads"}}) {
    for (const char* threads : {"0", "2", "64"}) {
      const Outcome outcome = run(arguments, threads);
      EXPECT_EQ(outcome.code, code);
      if (code == 2) {
        EXPECT_THAT(outcome.err, AllOf(HasSubstr("misa: threads: expected "), EndsWith("\n")));
        EXPECT_THAT(files.folder.names(), ElementsAre("bad", "in", "many"));
      }
    }
    EXPECT_EQ(run(arguments, "1").code, 0);
    std::filesystem::remove(files.out);
  }
  const Arguments calm[] = {{"info"},
                            {"inspect", files.in},
                            {"synth", "-o", files.out, "--keys", "99"},
                            {"calibrate", files.in, "--heads", "2"}};
  for (const Arguments& arguments : calm) {
    EXPECT_EQ(run_misa(arguments, {.no_threads = true}).code, 0);
  }
}

}  // namespace
}  // namespace misa::cli
