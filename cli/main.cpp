// The misa program. Exit code 0: done; 2: what the user gave is wrong, told in one line on stderr;
// 1: a defect of the program.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <cerrno>
#include <csignal>
#include <cstdio>
#include <exception>
#include <new>
#include <string>
#include <string_view>
#include <system_error>
#include <vector>

#include "commands.hpp"
#include "misa/context.hpp"
#include "misa/error.hpp"
#include "options.hpp"

namespace {

using misa::Error;
using misa::ErrorCode;

constexpr int kInternal = 1;
constexpr int kUserError = 2;

int fail(int code, std::string_view message) {
  fmt::print(stderr, "misa: {}\n", misa::cli::one_line(message));
  return code;
}

void flush_output() {
  if (std::fflush(stdout) != 0) {
    throw Error(ErrorCode::io, fmt::format("stdout: cannot be written: {}",
                                           std::generic_category().message(errno)));
  }
}

std::string no_command(const CLI::App& app) {
  std::vector<std::string> names;
  for (const CLI::App* command : app.get_subcommands({})) {
    names.push_back(command->get_name());
  }
  const std::vector<std::string> rest = app.remaining();
  return fmt::format("command: expected {} or --help, got {}", fmt::join(names, ", "),
                     rest.empty() ? "none" : "'" + rest.front() + "'");
}

int run(int argc, char** argv) {
  CLI::App app(
      "Indexers for sparse attention: which positions of its context each query attends to.\n"
      "Six indexers (dsa, misa, misa-dagger, hisa, misa-r, auto) run on the queries, head weights\n"
      "and keys of a safetensors file.",
      "misa");
  app.footer(R"(Try it:
  misa synth -o trace.safetensors --kind structured
  misa select trace.safetensors -o selected.safetensors --indexer misa-r
  misa compare trace.safetensors --html report.html

`misa COMMAND --help` tells more about each.)");
  app.set_version_flag("--version", std::string(misa::version()));
  app.require_subcommand(1);
  misa::cli::add_select(app);
  misa::cli::add_compare(app);
  misa::cli::add_bench(app);
  misa::cli::add_calibrate(app);
  misa::cli::add_inspect(app);
  misa::cli::add_synth(app);
  misa::cli::add_info(app);
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {
      app.exit(error);  // prints help or the version
    } else if (app.get_subcommands().empty()) {
      return fail(kUserError, no_command(app));
    } else {
      return fail(kUserError, error.what());
    }
  }
  flush_output();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  // A file that grows beyond its limit is then an error of write, told like a full disk.
  std::signal(SIGXFSZ, SIG_IGN);
  try {
    return run(argc, argv);
  } catch (const Error& error) {
    return fail(error.code() == ErrorCode::internal ? kInternal : kUserError, error.what());
  } catch (const std::bad_alloc&) {
    return fail(kUserError, "memory: expected enough for this input, got too little");
  } catch (const std::exception& error) {
    return fail(kInternal, error.what());
  }
}
