// SPDX-License-Identifier: Apache-2.0
// Errors about bad input: one line that names the input, what was expected and what was found.
#pragma once

#include <fmt/format.h>

#include <utility>

#include "misa/error.hpp"

namespace misa::cli {

template <class... Args>
[[noreturn]] void fail(fmt::format_string<Args...> message, Args&&... args) {
  throw Error(ErrorCode::invalid_argument, fmt::format(message, std::forward<Args>(args)...));
}

template <class... Args>
void require(bool condition, fmt::format_string<Args...> message, Args&&... args) {
  if (!condition) {
    fail(message, std::forward<Args>(args)...);
  }
}

}  // namespace misa::cli
