// SPDX-License-Identifier: Apache-2.0
#include "timing.hpp"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <chrono>
#include <cstddef>
#include <latch>
#include <optional>
#include <string>
#include <thread>
#include <vector>

namespace misa::cli {
namespace {

using ::testing::HasSubstr;
using ::testing::IsEmpty;

TEST(Measure, ContendersTakeTurns) {
  std::string order;
  int ticks = 0;
  const std::vector<Contender> contenders{[&] { order += 'a'; }, [&] { order += 'b'; },
                                          [&] { order += 'c'; }};
  const Timings timings = measure(3, contenders, [&] { ++ticks; });
  EXPECT_EQ(order,
            "abc"
            "abc"
            "cba"
            "abc");
  EXPECT_EQ(ticks, 12);
  ASSERT_EQ(timings.of.size(), 3U);
  for (const Timing& timing : timings.of) {
    EXPECT_EQ(timing.runs, 3);
    EXPECT_LE(timing.fastest, timing.median);
    EXPECT_LE(timing.median, timing.slowest);
    ASSERT_TRUE(timing.spread);
    EXPECT_GE(*timing.spread, 0);
    EXPECT_LE(*timing.spread, (timing.slowest - timing.fastest) / 2);
  }
}

TEST(Measure, OneRunHasNoSpread) {
  const Timings timings = measure(1, {[] {}});
  ASSERT_EQ(timings.of.size(), 1U);
  EXPECT_FALSE(timings.of.front().spread);
}

TEST(Measure, HasNoTimesOfNoContenders) { EXPECT_THAT(measure(3, {}).of, IsEmpty()); }

// Threads that spin, four for each processor, wait for one most of the time.
TEST(ProcessorTime, CountsWaiting) {
  const std::optional<ProcessorTime> before = processor_time();
  if (!before) {
    GTEST_SKIP() << "this system does not say how long threads wait";
  }
  std::vector<std::jthread> threads(4 * std::max(1U, std::thread::hardware_concurrency()));
  std::latch spun(static_cast<std::ptrdiff_t>(threads.size()));
  std::latch measured(1);
  for (std::jthread& thread : threads) {
    thread = std::jthread([&] {
      const auto end = std::chrono::steady_clock::now() + std::chrono::milliseconds(300);
      while (std::chrono::steady_clock::now() < end) {
      }
      spun.count_down();
      measured.wait();  // a thread that has ended is not counted any more
    });
  }
  spun.wait();
  const std::optional<ProcessorTime> after = processor_time();
  measured.count_down();
  ASSERT_TRUE(after);
  EXPECT_GT(after->running, before->running);
  EXPECT_GT(after->waiting - before->waiting, after->running - before->running);
}

TEST(Busy, IsSaidFromTheThresholdOn) {
  EXPECT_THAT(busy_warning(std::nullopt), IsEmpty());
  EXPECT_THAT(busy_warning(kBusy / 2), IsEmpty());
  EXPECT_THAT(busy_warning(0.25), HasSubstr("25 % of the time"));
}

TEST(Busy, TheLargerShareCounts) {
  EXPECT_EQ(more_waiting(std::nullopt, std::nullopt), std::nullopt);
  EXPECT_EQ(more_waiting(0.25, std::nullopt), 0.25);
  EXPECT_EQ(more_waiting(std::nullopt, 0.5), 0.5);
  EXPECT_EQ(more_waiting(0.25, 0.5), 0.5);
}

}  // namespace
}  // namespace misa::cli
