// SPDX-License-Identifier: Apache-2.0
// Parallel loops.
#pragma once

#include <cstdint>
#include <memory>

namespace misa {

// As many threads as the process may use, by its processors and by what its control groups allow.
int default_threads();

// Runs body(i, thread) for i in [0, count) on the context's threads, in the default floating-point
// mode; the order is unspecified.
class Threads {
 public:
  explicit Threads(int count);
  ~Threads();
  Threads(const Threads&) = delete;
  Threads& operator=(const Threads&) = delete;

  [[nodiscard]] int count() const { return count_; }

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

  struct Arena;
  std::unique_ptr<Arena> arena_;  // null for one thread
  int count_;
};

}  // namespace misa
