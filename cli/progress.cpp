// SPDX-License-Identifier: Apache-2.0
#include "progress.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <utility>

#include "streams.hpp"

namespace misa::cli {

Progress::Progress(std::string what, std::int64_t total)
    : what_(std::move(what)), total_(total), terminal_(::isatty(STDERR_FILENO) == 1) {
  if (terminal_) {
    write_err(fmt::format("{}   0 %", what_));
  }
}

Progress::~Progress() {
  if (terminal_) {
    write_err("\r\x1b[K");  // back to the first column, and clear
  }
}

void Progress::add(std::int64_t done) {
  done_ += done;
  constexpr auto kRedraw = std::chrono::milliseconds(100);  // as fast as one can read
  const auto now = Clock::now();
  if (!terminal_ || now - drawn_ < kRedraw) {
    return;
  }
  drawn_ = now;
  const double share = static_cast<double>(done_) / static_cast<double>(total_);
  const std::chrono::duration<double> spent = now - start_;
  write_err(fmt::format("\r\x1b[K{} {:3.0f} %, {:.0f} s left", what_, 100 * share,
                        spent.count() * (1 / share - 1)));
}

}  // namespace misa::cli
