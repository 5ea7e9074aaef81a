// SPDX-License-Identifier: Apache-2.0
// Standard output and standard error, each of which may be closed, full or a pipe without a reader.
#pragma once

#include <fmt/format.h>

#include <string_view>
#include <utility>

namespace misa::cli {

// Opens those of the descriptors 0, 1 and 2 that are closed, so that no file opened later gets one
// of these numbers and with it what is printed. They still cannot be read or written.
void hold_standard_descriptors();

// Write to the buffer of stdout, and flush it. Both throw Error if stdout cannot be written.
void write_out(std::string_view text);
void flush_out();

template <class... Args>
void print_out(fmt::format_string<Args...> format, Args&&... args) {
  write_out(fmt::format(format, std::forward<Args>(args)...));
}

// Writes to stderr. A failure is ignored, as there is nowhere left to report it.
void write_err(std::string_view text) noexcept;

}  // namespace misa::cli
