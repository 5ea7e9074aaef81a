// SPDX-License-Identifier: Apache-2.0
// The misa program. Exit code 0: success; 2: a user error, reported in one line on stderr; 1: a
// defect of the program. The machine's limits and a stdout that cannot be written (closed, full, or
// a pipe without a reader) count as user errors, like a full disk. If stderr cannot be written, the
// line is lost and the exit code stays.
#include <fmt/format.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <csignal>
#include <exception>
#include <new>
#include <sstream>
#include <string>
#include <string_view>

#include "commands.hpp"
#include "misa/context.hpp"
#include "misa/error.hpp"
#include "options.hpp"
#include "streams.hpp"
#include "usage.hpp"

namespace {

using misa::Error;
using misa::ErrorCode;

constexpr int kInternal = 1;
constexpr int kUserError = 2;

// Called from exception handlers, so it must not throw.
int fail(int code, std::string_view message) noexcept {
  try {
    misa::cli::write_err(fmt::format("misa: {}\n", misa::cli::one_line(message)));
  } catch (const std::exception&) {  // the message is lost, as when stderr is closed
  }
  return code;
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
  if (argc <= 1) {
    misa::cli::write_out(app.help());
    misa::cli::flush_out();
    return 0;
  }
  try {
    app.parse(argc, argv);
  } catch (const CLI::ParseError& error) {
    if (error.get_exit_code() == 0) {
      std::ostringstream text;  // help or the version
      app.exit(error, text, text);
      misa::cli::write_out(text.str());
    } else {
      return fail(kUserError, misa::cli::usage_error(app, error));
    }
  }
  misa::cli::flush_out();
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  misa::cli::hold_standard_descriptors();
  // Writes beyond the file size limit or to a pipe without a reader then fail with an error, as on
  // a full disk.
  std::signal(SIGXFSZ, SIG_IGN);
  std::signal(SIGPIPE, SIG_IGN);
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
