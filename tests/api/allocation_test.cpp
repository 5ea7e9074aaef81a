// SPDX-License-Identifier: Apache-2.0
// Running a plan allocates nothing. This program replaces the global operator new with one that
// counts.
#include <gtest/gtest.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <vector>

#include "core/workspace.hpp"
#include "misa/misa.hpp"
#include "support/check.hpp"
#include "support/inputs.hpp"

namespace {

std::atomic<int> allocations = 0;

void* count_and_allocate(std::size_t bytes, std::size_t alignment) {
  ++allocations;
  const std::size_t rounded = (bytes + alignment - 1) / alignment * alignment;
  void* memory = std::aligned_alloc(alignment, rounded == 0 ? alignment : rounded);
  if (memory == nullptr) {
    throw std::bad_alloc();
  }
  return memory;
}

}  // namespace

// The array forms are replaced too, because under a sanitizer they do not call the single forms.
void* operator new(std::size_t bytes) {
  return count_and_allocate(bytes, alignof(std::max_align_t));
}
void* operator new[](std::size_t bytes) { return operator new(bytes); }
void* operator new(std::size_t bytes, std::align_val_t alignment) {
  return count_and_allocate(bytes, static_cast<std::size_t>(alignment));
}
void* operator new[](std::size_t bytes, std::align_val_t alignment) {
  return operator new(bytes, alignment);
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete[](void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::align_val_t) noexcept { std::free(memory); }
void operator delete(void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }
void operator delete[](void* memory, std::size_t, std::align_val_t) noexcept { std::free(memory); }

namespace misa {
namespace {

template <class Inputs>
void expect_no_allocation(const std::string& backend, const IndexerConfig& config,
                          const Inputs& inputs, const Shape& shape, int threads) {
  const Plan plan(test::context_for(backend, threads), config, shape);
  const OwnWorkspace workspace(plan.workspace_bytes());
  std::vector<std::int32_t> indices(static_cast<std::size_t>(shape.tokens * config.top_k));
  const auto q = inputs.q(inputs.all());
  const auto w = inputs.w(inputs.all());
  const auto k = inputs.k(inputs.all());
  const auto run = [&] { plan.run(q, w, k, {indices, {}, {}, {}}, workspace.span()); };
  if (threads > 1) {
    run();  // the first run starts the threads
  }
  const int before = allocations;
  run();
  EXPECT_EQ(allocations - before, 0) << backend << ", " << threads << " threads";
}

TEST(Allocation, TheCounterCounts) {
  // Called as functions, because the compiler may remove a new-expression.
  const int before = allocations;
  ::operator delete(::operator new(1));
  ::operator delete[](::operator new[](1));
  ::operator delete (::operator new (1, std::align_val_t{128}), std::align_val_t{128});
  ::operator delete[](::operator new[](1, std::align_val_t{128}), std::align_val_t{128});
  EXPECT_EQ(allocations - before, 4);
}

TEST(Allocation, RunsAllocateNothing) {
  const test::Pack pack = test::make_pack({.sequences = {{300, 20}, {150, 20}},
                                           .heads = 8,
                                           .dim = 64,
                                           .q_dtype = DType::bf16,
                                           .k_dtype = DType::e4m3});
  const test::RaggedInputs ragged(pack);
  const test::PagedInputs paged(pack, {.page_sums = true});
  const Shape shape{40, 8, 64, 300, DType::bf16, DType::e4m3};
  // Together they go through every stage.
  IndexerConfig filtered = IndexerConfig::hisa(40, 64, 2);
  filtered.router = Router::dispersion;
  filtered.heads = 2;
  IndexerConfig by_length = IndexerConfig::automatic(40);
  by_length.dense_work = 200 * 8;
  IndexerConfig sketched = IndexerConfig::misa_r(40, 2, 80);
  sketched.sketch = 2;
  const std::vector<IndexerConfig> configs{IndexerConfig::dsa(40),
                                           IndexerConfig::misa(40, 2),
                                           IndexerConfig::misa_dagger(40, 2, 80),
                                           IndexerConfig::misa_r(40, 2, 80),
                                           filtered,
                                           by_length,
                                           sketched};
  for (const BackendInfo& backend : backends()) {
    // The reference may allocate, so that it can follow the formulas. CUDA backends copy inputs in
    // host memory to the device first; tests/gpu checks plans for device memory.
    if (!backend.available || backend.name == "reference" || backend.name.starts_with("cuda")) {
      continue;
    }
    for (const IndexerConfig& config : configs) {
      for (const int threads : {1, 2}) {
        expect_no_allocation(backend.name, config, ragged, shape, threads);
        expect_no_allocation(backend.name, config, paged, shape, threads);
      }
    }
  }
}

}  // namespace
}  // namespace misa
