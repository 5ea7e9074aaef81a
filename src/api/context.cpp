// SPDX-License-Identifier: Apache-2.0
#include "misa/context.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstdlib>

#include "api/backends.hpp"
#include "misa/error.hpp"

namespace misa {

std::span<const Backend* const> all_backends() {
  static const std::vector<const Backend*> list = [] {
    std::vector<const Backend*> all;
#if MISA_HAVE_CUDA
    all.insert(all.end(), cuda_backends().begin(), cuda_backends().end());
#endif
    all.insert(all.end(), cpu_backends().begin(), cpu_backends().end());
    all.push_back(&reference_backend());
    return all;
  }();
  return list;
}

std::vector<BackendInfo> backends() {
  std::vector<BackendInfo> infos;
  for (const Backend* backend : all_backends()) {
    infos.push_back(backend->info());
  }
  return infos;
}

std::string_view version() { return MISA_VERSION; }

const Backend& choose_backend(std::span<const Backend* const> from, std::string_view place,
                              std::string_view name) {
  std::string_view argument = "backend";
  // NOLINTNEXTLINE(concurrency-mt-unsafe): we set no variable
  if (const char* variable = std::getenv("MISA_BACKEND");
      name == "auto" && variable != nullptr && *variable != '\0') {
    argument = "MISA_BACKEND";
    name = variable;
  }
  std::vector<std::string> names{"auto"};
  std::string requirement;  // of the last backend that matches but cannot run
  for (const Backend* backend : from) {
    const BackendInfo info = backend->info();
    const std::string family = info.name.substr(0, info.name.find('-'));
    const bool matches = name == "auto" || name == family || name == info.name;
    if (info.available && matches) {
      return *backend;
    }
    if (matches) {
      requirement = info.requirement;
    }
    for (const std::string& accepted : {family, info.name}) {
      if (info.available && std::find(names.begin(), names.end(), accepted) == names.end()) {
        names.push_back(accepted);
      }
    }
  }
#if !MISA_HAVE_CUDA
  if (name == "cuda" || name.starts_with("cuda-")) {
    requirement = "a build with CUDA backends (MISA_BUILD_CUDA=ON), which this one is not";
  }
#endif
  if (!requirement.empty()) {
    throw Error(ErrorCode::unsupported,
                fmt::format("{}: '{}' needs {}", argument, name, requirement));
  }
  throw Error(ErrorCode::unsupported, fmt::format("{}: expected {} for arrays in {}, got '{}'",
                                                  argument, fmt::join(names, ", "), place, name));
}

Context::Context(const ContextOptions& options) {
  constexpr int kMaxThreads = 1024;
  if (options.threads < 0 || options.threads > kMaxThreads) {
    throw Error(ErrorCode::invalid_argument, fmt::format("threads: expected 0 (all) to {}, got {}",
                                                         kMaxThreads, options.threads));
  }
  const Backend& backend = choose_backend(all_backends(), "host memory", options.backend);
  const int threads = options.threads > 0 ? options.threads : default_threads();
  state_ = std::make_shared<const State>(backend, threads, options.workspace_cap);
}

std::string Context::backend() const { return state_->backend.info().name; }
int Context::threads() const { return state_->threads.count(); }
std::size_t Context::workspace_cap() const { return state_->workspace_cap; }

}  // namespace misa
