// SPDX-License-Identifier: Apache-2.0
// What a backend is: a name, a requirement, a priority, and the two halves of a plan.
#pragma once

#include <cstddef>
#include <memory>
#include <span>
#include <string_view>

#include "indexers/problem.hpp"
#include "misa/context.hpp"

namespace misa {

// A backend's half of a plan: what it worked out from shapes alone.
class BackendPlan {
 public:
  virtual ~BackendPlan() = default;

  [[nodiscard]] virtual std::size_t workspace_bytes() const = 0;

  // Computes a validated problem whose shape is within the planned one.
  virtual void run(const Problem& problem, std::span<std::byte> workspace) const = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;

  [[nodiscard]] virtual BackendInfo info() const = 0;

  // Throws Error if the context's workspace cap cannot hold the smallest slab. The plan may refer
  // to the context, which outlives it.
  [[nodiscard]] virtual std::unique_ptr<const BackendPlan> plan(
      const IndexerConfig& config, const Shape& shape, const Context::State& context) const = 0;
};

const Backend& reference_backend();
std::span<const Backend* const> cpu_backends();   // one an instruction set, by falling priority
std::span<const Backend* const> cuda_backends();  // in builds with CUDA, by falling priority

// Every backend of this build, by falling priority.
std::span<const Backend* const> all_backends();

// The first of these that this machine can run and that the name stands for: "auto" (then the
// variable MISA_BACKEND names it, where it is set), a family ("cpu", "cuda") or a backend's own
// name. Throws Error, which names the argument or the variable; `place` is where they take arrays.
const Backend& choose_backend(std::span<const Backend* const> from, std::string_view place,
                              std::string_view name);

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

struct Context::State {
  State(const Backend& chosen, int thread_count, std::size_t cap)
      : backend(chosen), threads(thread_count), workspace_cap(cap) {}

  const Backend& backend;
  Threads threads;
  std::size_t workspace_cap;
};

}  // namespace misa
