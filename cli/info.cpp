// SPDX-License-Identifier: Apache-2.0
// misa info: what this build can run here.
#include <fmt/format.h>

#include <CLI/App.hpp>
#include <memory>
#include <nlohmann/json.hpp>

#include "commands.hpp"
#include "misa/context.hpp"
#include "options.hpp"
#include "streams.hpp"

namespace misa::cli {
namespace {

void run(bool json) {
  const Context context;
  if (!json) {
    print_out("misa {}\nthreads {}\n\n{:18} {:13} {}\n", version(), context.threads(), "backend",
              "ISA", "");
    for (const BackendInfo& backend : backends()) {
      const char* state = backend.name == context.backend() ? "used by default"
                          : backend.available               ? "available"
                                                            : "not available: needs ";
      print_out("{:18} {:13} {}{}\n", backend.name, backend.isa, state,
                backend.available ? "" : backend.requirement);
    }
    return;
  }
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  for (const BackendInfo& backend : backends()) {
    list.push_back({{"name", backend.name},
                    {"isa", backend.isa},
                    {"requirement", backend.requirement},
                    {"available", backend.available},
                    {"priority", backend.priority}});
  }
  nlohmann::ordered_json known = nlohmann::ordered_json::object();
  for (const Fact& fact : facts()) {
    known[fact.name] = fact.value;
  }
  print_json({{"version", version()},
              {"backend", context.backend()},
              {"threads", context.threads()},
              {"backends", list},
              {"facts", known}});
}

}  // namespace

void add_info(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "info", "The version, the backends with their instruction sets, and the threads");
  const auto json = std::make_shared<bool>(false);
  add_json_option(*command, *json);
  command->footer(
      "MISA_BACKEND in the environment chooses the default backend. A report of a fault should "
      "hold\n"
      "what the example prints: the build, the machine, its devices.\n\n"
      "Example:\n  misa info --json");
  command->callback([json] { run(*json); });
}

}  // namespace misa::cli
