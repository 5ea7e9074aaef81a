// SPDX-License-Identifier: Apache-2.0
#include "streams.hpp"

#include <fcntl.h>
#include <unistd.h>

#include <cerrno>
#include <cstdio>
#include <system_error>

#include "misa/error.hpp"

namespace misa::cli {
namespace {

[[noreturn]] void fail_out() {
  throw Error(ErrorCode::io,
              fmt::format("stdout: cannot be written: {}", std::generic_category().message(errno)));
}

}  // namespace

void hold_standard_descriptors() {
  for (const int descriptor : {STDIN_FILENO, STDOUT_FILENO, STDERR_FILENO}) {
    if (::fcntl(descriptor, F_GETFD) < 0) {
      // open returns the lowest free number, which is this one. The root folder always exists and
      // can neither be read nor written.
      (void)::open("/", O_RDONLY | O_DIRECTORY | O_CLOEXEC);
    }
  }
}

void write_out(std::string_view text) {
  if (std::fwrite(text.data(), 1, text.size(), stdout) != text.size()) {
    fail_out();
  }
}

void flush_out() {
  if (std::fflush(stdout) != 0) {
    fail_out();
  }
}

void write_err(std::string_view text) noexcept {
  while (!text.empty()) {
    const ssize_t written = ::write(STDERR_FILENO, text.data(), text.size());
    if (written < 0 && errno == EINTR) {
      continue;
    }
    if (written <= 0) {
      return;
    }
    text.remove_prefix(static_cast<std::size_t>(written));
  }
}

}  // namespace misa::cli
