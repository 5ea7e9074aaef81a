// SPDX-License-Identifier: Apache-2.0
// Times of contenders that take turns, so that whatever else the machine does slows all of them.
#pragma once

#include <functional>
#include <optional>
#include <string>
#include <vector>

namespace misa::cli {

// Seconds per run.
struct Timing {
  double median = 0;
  double fastest = 0;
  double slowest = 0;
  std::optional<double> spread;  // half the distance between the quartiles; none of one run
  int runs = 0;
};

struct Timings {
  std::vector<Timing> of;  // each contender

  // The share of the time in which this program's threads were ready to run and waited for a
  // processor; none where the system does not say, or all runs together are too short to tell.
  std::optional<double> waited;
};

using Contender = std::function<void()>;

// Runs every contender once without timing it, as the first run touches memory for the first time,
// and then `runs` times, in rounds of all contenders, every other round in reverse. Calls
// after_each() after every run, which is not timed.
Timings measure(
    int runs, const std::vector<Contender>& contenders,
    const std::function<void()>& after_each = [] {});

// What the program's threads did so far, in seconds.
struct ProcessorTime {
  double running = 0;
  double waiting = 0;  // ready to run, but no processor was free
};

// None where the system does not say.
std::optional<ProcessorTime> processor_time();

// The larger share; none is none.
std::optional<double> more_waiting(std::optional<double> a, std::optional<double> b);

// From this share on, times are not to be trusted.
inline constexpr double kBusy = 0.05;

// What is to be said of such a share; empty below kBusy.
std::string busy_warning(std::optional<double> waited);

// Writes it to stderr.
void warn_if_busy(std::optional<double> waited);

}  // namespace misa::cli
