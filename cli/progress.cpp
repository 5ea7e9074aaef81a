// SPDX-License-Identifier: Apache-2.0
#include "progress.hpp"

#include <fmt/format.h>
#include <unistd.h>

#include <algorithm>
#include <system_error>
#include <utility>

#include "streams.hpp"

namespace misa::cli {

Progress::Progress(std::string what, std::int64_t total)
    : what_(std::move(what)), total_(total), terminal_(::isatty(STDERR_FILENO) == 1) {
  if (!terminal_) {
    return;
  }
  draw(start_);
  try {
    clock_ = std::jthread([this](const std::stop_token& stop) { draw_every_second(stop); });
  } catch (const std::system_error&) {  // no thread to be had: the line is drawn by add() alone
  }
}

Progress::~Progress() {
  clock_ = {};  // ends it
  if (terminal_) {
    write_err("\r\x1b[K");  // back to the first column, and clear
  }
}

void Progress::add(std::int64_t done) {
  constexpr auto kRedraw = std::chrono::milliseconds(100);  // as fast as one can read
  const std::lock_guard lock(mutex_);
  done_ += done;
  known_ = Clock::now();
  if (terminal_ && known_ - drawn_ >= kRedraw) {
    draw(known_);
  }
}

void Progress::draw_every_second(const std::stop_token& stop) {
  std::unique_lock lock(mutex_);
  while (!stopped_.wait_for(lock, stop, std::chrono::seconds(1),
                            [&stop] { return stop.stop_requested(); })) {
    draw(Clock::now());
  }
}

void Progress::draw(Clock::time_point now) {
  drawn_ = now;
  const auto seconds = [](Clock::duration d) { return std::chrono::duration<double>(d).count(); };
  const double share = static_cast<double>(done_) / static_cast<double>(total_);
  std::string line =
      fmt::format("\r\x1b[K{} {:3.0f} %, {:.0f} s", what_, 100 * share, seconds(now - start_));
  if (done_ > 0) {
    const double left = seconds(known_ - start_) * (1 / share - 1) - seconds(now - known_);
    line += fmt::format(", {:.0f} s left", std::max(0.0, left));
  }
  write_err(line);
}

}  // namespace misa::cli
