// SPDX-License-Identifier: Apache-2.0
// A line on stderr that shows the progress of long work, if stderr is a terminal. It is drawn again
// every second, by a thread that does nothing else, since a part of the work may take minutes.
#pragma once

#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <stop_token>
#include <string>
#include <thread>

namespace misa::cli {

class Progress {
 public:
  Progress(std::string what, std::int64_t total);
  ~Progress();  // clears the line
  Progress(const Progress&) = delete;
  Progress& operator=(const Progress&) = delete;

  void add(std::int64_t done);

 private:
  using Clock = std::chrono::steady_clock;

  void draw_every_second(const std::stop_token& stop);
  void draw(Clock::time_point now);

  std::string what_;
  std::int64_t total_;
  bool terminal_;
  Clock::time_point start_ = Clock::now();
  std::mutex mutex_;  // of the members below
  std::condition_variable_any stopped_;
  std::int64_t done_ = 0;
  Clock::time_point known_ = start_;  // when done_ was told
  Clock::time_point drawn_ = start_;
  std::jthread clock_;
};

}  // namespace misa::cli
