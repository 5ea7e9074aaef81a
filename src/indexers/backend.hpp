// SPDX-License-Identifier: Apache-2.0
// The interface of a backend: what it is and requires, and its plans.
#pragma once

#include <cstddef>
#include <memory>
#include <span>

#include "core/means_problem.hpp"
#include "core/problem.hpp"
#include "cpu/threads.hpp"
#include "misa/context.hpp"

namespace misa {

// What a backend works out for a plan, from shapes alone.
class BackendPlan {
 public:
  virtual ~BackendPlan() = default;

  [[nodiscard]] virtual std::size_t workspace_bytes() const = 0;

  // Computes a validated problem whose shape does not exceed the planned one.
  virtual void run(const Problem& problem, std::span<std::byte> workspace) const = 0;
};

class Backend {
 public:
  virtual ~Backend() = default;

  [[nodiscard]] virtual BackendInfo info() const = 0;

  // Throws Error if the context's workspace cap is too small for one query. The plan may refer to
  // the context, which outlives it.
  [[nodiscard]] virtual std::unique_ptr<const BackendPlan> plan(
      const IndexerConfig& config, const Shape& shape, const Context::State& context) const = 0;

  // The pooled router's heads, and the blocks that the block filter keeps, from block means.
  virtual void route(const MeansProblem& problem, const Context::State& context) const = 0;
  virtual void keep_blocks(const MeansProblem& problem, const Context::State& context) const = 0;
};

const Backend& reference_backend();
std::span<const Backend* const> cpu_backends();   // one per instruction set, by falling priority
std::span<const Backend* const> cuda_backends();  // in builds with CUDA, by falling priority

struct Context::State {
  State(const Backend& chosen, int thread_count, std::size_t cap)
      : backend(chosen), threads(thread_count), workspace_cap(cap) {}

  const Backend& backend;
  Threads threads;
  std::size_t workspace_cap;
};

}  // namespace misa
