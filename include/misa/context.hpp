// SPDX-License-Identifier: Apache-2.0
/// \file
/// The backend, its threads and its memory cap.
#pragma once

#include <cstddef>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

#include "misa/types.hpp"

namespace misa {

struct ContextOptions {
  /// "auto", "cpu", "cuda", or a backend's own name. "auto" is the backend that the environment
  /// variable MISA_BACKEND names, otherwise the one of highest priority that this machine can run;
  /// "cpu" and "cuda" choose the one of highest priority of their kind. The arrays of a call are in
  /// host memory with every backend; misa/cuda.hpp is for arrays in device memory.
  std::string_view backend = "auto";
  int threads = 0;  ///< 0: as many as the process's CPU affinity and quota allow
  std::size_t workspace_cap = kDefaultWorkspaceCap;  ///< limit of a plan's workspace, in bytes
};

/// A backend as `misa info` lists it.
struct BackendInfo {
  std::string name;
  std::string isa;          ///< the instruction set it runs, e.g. "AVX-512 BF16"
  std::string requirement;  ///< what it needs to run
  bool available = false;
  int priority = 0;  ///< "auto" chooses the highest available
};

/// A cheap handle, shared by the plans made from it.
class Context {
 public:
  /// Throws Error if the backend is unknown (the message lists those present) or unavailable.
  explicit Context(const ContextOptions& options = {});

  [[nodiscard]] std::string backend() const;
  [[nodiscard]] int threads() const;
  [[nodiscard]] std::size_t workspace_cap() const;

  struct State;
  [[nodiscard]] const State& state() const { return *state_; }

 private:
  std::shared_ptr<const State> state_;
};

/// Every backend of this build, available or not, in order of decreasing priority.
std::vector<BackendInfo> backends();

/// The library's version, "major.minor.patch".
std::string_view version();

/// A fact about this build or the machine it runs on.
struct Fact {
  std::string name;   ///< e.g. "compiler"
  std::string value;  ///< e.g. "GCC 12.2.0"; empty if unknown
};

/// What a bug report should say about this build and this machine: compiler, libraries, system,
/// processors and their limits, CUDA architectures and devices, environment variables of misa.
std::vector<Fact> facts();

}  // namespace misa
