// SPDX-License-Identifier: Apache-2.0
// The subcommands of the misa program. Each function adds one subcommand with its options, its help
// and the callback that runs it, which throws errors.
#pragma once

#include <CLI/App.hpp>

namespace misa::cli {

void add_select(CLI::App& app);
void add_compare(CLI::App& app);
void add_bench(CLI::App& app);
void add_info(CLI::App& app);
void add_inspect(CLI::App& app);
void add_synth(CLI::App& app);
void add_calibrate(CLI::App& app);

}  // namespace misa::cli
