// SPDX-License-Identifier: Apache-2.0
// Parallel loops.
#pragma once

#include <cstdint>
#include <memory>

namespace misa {

// As many threads as the process has processors, or fewer if its control groups allow less
// processor time.
int default_threads();

// The threads of a context.
class Threads {
 public:
  explicit Threads(int count);
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  [[nodiscard]] int count() const { return count_; }

  // Calls body(i, thread) for i in [0, count) in any order, in the default floating-point mode.
  template <class Body>
  void for_each(std::int64_t count, const Body& body) const {
    run(
        count,
        [](const void* state, std::int64_t i, int thread) {
          (*static_cast<const Body*>(state))(i, thread);
        },
        &body);
  }

 private:
  void run(std::int64_t count, void (*call)(const void*, std::int64_t, int),
           const void* state) const;

  struct TaskArena;
  std::unique_ptr<TaskArena> arena_;  // null for one thread
  int count_;
};

}  // namespace misa
