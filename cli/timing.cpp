// SPDX-License-Identifier: Apache-2.0
#include "timing.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <filesystem>
#include <fstream>
#include <iterator>
#include <string>
#include <system_error>

#include "metrics.hpp"
#include "streams.hpp"

namespace misa::cli {
namespace {

// Less than this says nothing: threads may wait a little when they are started.
constexpr double kLeastKnown = 0.05;  // seconds

Timing timing_of(const std::vector<double>& seconds) {
  std::optional<double> spread;
  if (seconds.size() > 1) {
    spread = (quantile(seconds, 0.75) - quantile(seconds, 0.25)) / 2;
  }
  return {quantile(seconds, 0.5), quantile(seconds, 0), quantile(seconds, 1), spread,
          static_cast<int>(seconds.size())};
}

}  // namespace

// Linux says for each thread how long it ran and how long it waited, in nanoseconds.
std::optional<ProcessorTime> processor_time() {
  ProcessorTime sum;
  bool any = false;
  std::error_code error;
  for (const auto& thread : std::filesystem::directory_iterator("/proc/self/task", error)) {
    std::ifstream file(thread.path() / "schedstat");
    if (double running = 0, waiting = 0; file >> running >> waiting) {
      sum.running += 1e-9 * running;
      sum.waiting += 1e-9 * waiting;
      any = true;
    }
  }
  return any && sum.running > 0 ? std::optional(sum) : std::nullopt;
}

std::optional<double> more_waiting(std::optional<double> a, std::optional<double> b) {
  return a && b ? std::max(a, b) : a ? a : b;
}

std::string busy_warning(std::optional<double> waited) {
  return waited.value_or(0) < kBusy
             ? std::string()
             : fmt::format(
                   "The machine was busy: this program waited for a processor {:.0f} % of "
                   "the time, so times are too long and vary.",
                   100 * *waited);
}

void warn_if_busy(std::optional<double> waited) {
  if (const std::string warning = busy_warning(waited); !warning.empty()) {
    write_err(fmt::format("misa: {}\n", warning));
  }
}

Timings measure(int runs, const std::vector<Contender>& contenders,
                const std::function<void()>& after_each) {
  for (const Contender& contender : contenders) {
    contender();
    after_each();
  }
  const std::optional<ProcessorTime> before = processor_time();
  std::vector<std::vector<double>> seconds(contenders.size());
  for (int round = 0; round < runs; ++round) {
    for (std::size_t i = 0; i < contenders.size(); ++i) {
      const std::size_t turn = round % 2 == 0 ? i : contenders.size() - 1 - i;
      const auto start = std::chrono::steady_clock::now();
      contenders[turn]();
      const auto end = std::chrono::steady_clock::now();
      seconds[turn].push_back(std::chrono::duration<double>(end - start).count());
      after_each();
    }
  }
  Timings timings;
  std::transform(seconds.begin(), seconds.end(), std::back_inserter(timings.of), timing_of);
  if (const std::optional<ProcessorTime> after = processor_time(); before && after) {
    // A thread that has ended takes its times with it.
    const double running = std::max(0.0, after->running - before->running);
    const double waiting = std::max(0.0, after->waiting - before->waiting);
    if (running + waiting >= kLeastKnown) {
      timings.waited = waiting / (running + waiting);
    }
  }
  return timings;
}

}  // namespace misa::cli
