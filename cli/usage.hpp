// SPDX-License-Identifier: Apache-2.0
// What is wrong with the arguments of the program.
#pragma once

#include <CLI/App.hpp>
#include <string>

namespace misa::cli {

// What to tell the user about arguments that the program's app refused: which it is, the name that
// may have been meant, and where the help is.
std::string usage_error(const CLI::App& app, const CLI::ParseError& error);

}  // namespace misa::cli
