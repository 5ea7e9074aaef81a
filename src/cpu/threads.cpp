// SPDX-License-Identifier: Apache-2.0
// Parallel loops over oneTBB.
#include "cpu/threads.hpp"

#include <fmt/format.h>
#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/info.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>

#include <algorithm>
#include <atomic>
#include <iterator>
#include <map>
#include <memory>
#include <mutex>
#include <system_error>
#include <thread>
#include <vector>

#include "core/float_mode.hpp"
#include "cpu/quota.hpp"
#include "misa/error.hpp"

namespace misa {
namespace {

// The most threads that oneTBB lets the process use. If asked for more, it adds none and prints a
// warning.
int most_threads() {
  using Control = tbb::global_control;
  return static_cast<int>(Control::active_value(Control::max_allowed_parallelism));
}

// Task arenas that no context is using, by number of threads. Some versions of oneTBB never free an
// arena's memory, so arenas are reused: there are never more than were in use at once.
class IdleArenas {
 public:
  std::unique_ptr<tbb::task_arena> take(int threads) {
    const std::lock_guard lock(mutex_);
    Kind& kind = kinds_[threads];
    if (kind.idle.empty()) {
      kind.idle.reserve(kind.made + 1);  // so that give_back cannot fail
      ++kind.made;
      return std::make_unique<tbb::task_arena>(threads);
    }
    std::unique_ptr<tbb::task_arena> arena = std::move(kind.idle.back());
    kind.idle.pop_back();
    return arena;
  }

  void give_back(std::unique_ptr<tbb::task_arena> arena, int threads) noexcept {
    const std::lock_guard lock(mutex_);
    kinds_.find(threads)->second.idle.push_back(std::move(arena));
  }

 private:
  struct Kind {
    std::vector<std::unique_ptr<tbb::task_arena>> idle;
    std::size_t made = 0;
  };

  std::mutex mutex_;
  std::map<int, Kind> kinds_;
};

// Never destroyed, because a context may outlive every static object.
IdleArenas& idle_arenas() {
  static auto* const arenas = new IdleArenas;
  return *arenas;
}

// oneTBB aborts the process if it cannot start a thread. So this function first starts `count` - 1
// threads at once and ends them: where the system allows fewer, it throws an error.
void require_threads(int count) {
  static std::atomic<int> most{1};  // the largest count that has succeeded
  if (count <= most.load(std::memory_order_relaxed)) {
    return;
  }
  std::mutex gate;
  std::vector<std::jthread> started;
  try {
    const std::lock_guard closed(gate);
    while (std::ssize(started) < count - 1) {
      started.emplace_back([&gate] { const std::lock_guard passed(gate); });
    }
  } catch (const std::system_error& error) {
    throw Error(ErrorCode::unsupported,
                fmt::format("threads: expected {} that the system can run at once, got {}: {}",
                            count, started.size() + 1, error.code().message()));
  }
  most.store(count, std::memory_order_relaxed);
}

}  // namespace

// The task arena that a context uses for its lifetime.
struct Threads::TaskArena {
  explicit TaskArena(int most) : threads(most), held(idle_arenas().take(threads)) {}
  ~TaskArena() { idle_arenas().give_back(std::move(held), threads); }
  TaskArena(const TaskArena&) = delete;
  TaskArena& operator=(const TaskArena&) = delete;

  int threads;
  std::unique_ptr<tbb::task_arena> held;
};

Threads::Threads(int count)
    : arena_(count > 1 ? std::make_unique<TaskArena>(std::min(count, most_threads())) : nullptr),
      count_(count) {}
Threads::~Threads() = default;

int default_threads() {
  const int processors = tbb::info::default_concurrency();
  return std::min(processors, cpu_quota().value_or(processors));
}

void Threads::run(std::int64_t count, void (*call)(const void*, std::int64_t, int),
                  const void* state) const {
  if (count_ == 1 || count == 1) {
    const DefaultFloatMode mode;
    for (std::int64_t i = 0; i < count; ++i) {
      call(state, i, 0);
    }
    return;
  }
  require_threads(arena_->threads);
  // oneTBB orders the start before every task and every task before the end. Its library is not
  // built for thread sanitizers, so this atomic shows them the same order.
  std::atomic<std::int64_t> order{0};
  order.store(1, std::memory_order_release);
  arena_->held->execute([&] {
    tbb::parallel_for(
        tbb::blocked_range<std::int64_t>(0, count, 1),
        [&](const tbb::blocked_range<std::int64_t>& range) {
          (void)order.load(std::memory_order_acquire);
          const DefaultFloatMode mode;
          for (std::int64_t i = range.begin(); i < range.end(); ++i) {
            call(state, i, tbb::this_task_arena::current_thread_index());
          }
          order.fetch_add(1, std::memory_order_release);
        },
        tbb::simple_partitioner());
  });
  (void)order.load(std::memory_order_acquire);
}

}  // namespace misa
