// SPDX-License-Identifier: Apache-2.0
// Standard output and standard error, each of which may be closed, full or a pipe that nobody
// reads.
#pragma once

#include <fmt/format.h>

#include <string_view>
#include <utility>

namespace misa::cli {

// Opens those of the descriptors 0, 1 and 2 that are closed, so that none of the files opened later
// gets what is printed. They can still not be read or written.
void hold_standard_descriptors();

// Writes to stdout, flush what it still keeps. Both throw Error if that cannot be written.
void write_out(std::string_view text);
void flush_out();

template <class... Args>
void print_out(fmt::format_string<Args...> format, Args&&... args) {
  write_out(fmt::format(format, std::forward<Args>(args)...));
}

// Writes to stderr. What cannot be written there is lost: nobody is left to be told.
void write_err(std::string_view text) noexcept;

}  // namespace misa::cli
