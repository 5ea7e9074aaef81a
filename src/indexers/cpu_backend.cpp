// SPDX-License-Identifier: Apache-2.0
// The CPU backends, one per instruction set.
#include <memory>
#include <vector>

#include "indexers/backend.hpp"
#include "indexers/cpu.hpp"
#include "indexers/cpu_means.hpp"

namespace misa {
namespace cpu {
namespace {

class CpuPlan final : public BackendPlan {
 public:
  CpuPlan(const Kernels& kernels, const WorkspaceSpec& spec, const Threads& threads)
      : kernels_(kernels), spec_(spec), threads_(threads) {}

  std::size_t workspace_bytes() const override { return bytes_of(spec_); }

  void run(const Problem& problem, std::span<std::byte> workspace) const override {
    cpu::run(kernels_, problem, spec_, threads_, workspace);
  }

 private:
  const Kernels& kernels_;
  WorkspaceSpec spec_;
  const Threads& threads_;
};

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const Kernels& kernels) : kernels_(kernels) {}

  BackendInfo info() const override {
    return {kernels_.name, kernels_.isa, kernels_.requirement, kernels_.available(),
            kernels_.priority};
  }

  std::unique_ptr<const BackendPlan> plan(const IndexerConfig& config, const Shape& shape,
                                          const Context::State& context) const override {
    return std::make_unique<CpuPlan>(kernels_, plan_workspace(config, shape, kernels_, context),
                                     context.threads);
  }

  void route(const MeansProblem& problem, const Context::State& context) const override {
    route_from_means(kernels_, problem, context.threads);
  }

  void keep_blocks(const MeansProblem& problem, const Context::State& context) const override {
    keep_blocks_from_means(kernels_, problem, context.threads);
  }

 private:
  const Kernels& kernels_;
};

}  // namespace
}  // namespace cpu

std::span<const Backend* const> cpu_backends() {
  static const std::vector<cpu::CpuBackend> backends = [] {
    std::vector<cpu::CpuBackend> list;
    for (const cpu::Kernels* kernels : cpu::kernels()) {
      list.emplace_back(*kernels);
    }
    return list;
  }();
  static const std::vector<const Backend*> pointers = [] {
    std::vector<const Backend*> list;
    for (const cpu::CpuBackend& backend : backends) {
      list.push_back(&backend);
    }
    return list;
  }();
  return pointers;
}

}  // namespace misa
