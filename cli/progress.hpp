// SPDX-License-Identifier: Apache-2.0
// A line on stderr that shows the progress of long work, if stderr is a terminal.
#pragma once

#include <chrono>
#include <cstdint>
#include <string>

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

  std::string what_;
  std::int64_t total_;
  std::int64_t done_ = 0;
  bool terminal_;
  Clock::time_point start_ = Clock::now();
  Clock::time_point drawn_ = start_;
};

}  // namespace misa::cli
