#include "misa/context.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>
#include <oneapi/tbb/global_control.h>
#include <oneapi/tbb/info.h>
#include <oneapi/tbb/parallel_for.h>
#include <oneapi/tbb/task_arena.h>

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "dispatch/backend.hpp"
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

struct Threads::Arena {
  // No more than the process may use: beyond that the scheduler adds none, but prints a warning.
  explicit Arena(int threads) : arena(std::min(threads, most())) {}
  static int most() {
    using Control = tbb::global_control;
    return static_cast<int>(Control::active_value(Control::max_allowed_parallelism));
  }
  mutable tbb::task_arena arena;
};

Threads::Threads(int count) : arena_(std::make_unique<Arena>(count)), count_(count) {}
Threads::~Threads() = default;

void Threads::run(std::int64_t count, void (*call)(const void*, std::int64_t, int),
                  const void* state) const {
  if (count_ == 1 || count == 1) {
    for (std::int64_t i = 0; i < count; ++i) {
      call(state, i, 0);
    }
    return;
  }
  // The scheduler orders the start before every task and every task before the end; the atomic says
  // the same where a tool can see it, since the scheduler's library is not built for one.
  std::atomic<std::int64_t> order{0};
  order.store(1, std::memory_order_release);
  arena_->arena.execute([&] {
    tbb::parallel_for(
        tbb::blocked_range<std::int64_t>(0, count, 1),
        [&](const tbb::blocked_range<std::int64_t>& range) {
          (void)order.load(std::memory_order_acquire);
          for (std::int64_t i = range.begin(); i < range.end(); ++i) {
            call(state, i, tbb::this_task_arena::current_thread_index());
          }
          order.fetch_add(1, std::memory_order_release);
        },
        tbb::simple_partitioner());
  });
  (void)order.load(std::memory_order_acquire);
}

namespace {

const Backend& choose(std::string_view name) {
  if (name == "auto") {
    const char* wanted = std::getenv("MISA_BACKEND");
    name = wanted != nullptr && *wanted != '\0' ? wanted : "auto";
  }
  std::vector<std::string> present{"auto", "cpu"};
  std::string requirement;  // of the last backend that was asked for and cannot run
  for (const Backend* backend : all_backends()) {
    const BackendInfo info = backend->info();
    const bool family = (name == "cpu" || name == "cuda") && info.name.starts_with(name);
    if (info.available && (name == "auto" || family || info.name == name)) {
      return *backend;
    }
    if (family || info.name == name) {
      requirement = info.requirement;
    }
    if (info.available) {
      present.push_back(info.name);
    }
  }
  if (!requirement.empty()) {
    throw Error(ErrorCode::unsupported, fmt::format("backend: '{}' needs {}", name, requirement));
  }
  throw Error(ErrorCode::unsupported,
              fmt::format("backend: expected {}, got '{}'", fmt::join(present, ", "), name));
}

}  // namespace

Context::Context(const ContextOptions& options) {
  constexpr int kMaxThreads = 1024;
  if (options.threads < 0 || options.threads > kMaxThreads) {
    throw Error(ErrorCode::invalid_argument, fmt::format("threads: expected 0 (all) to {}, got {}",
                                                         kMaxThreads, options.threads));
  }
  const Backend& backend = choose(options.backend);
  const int threads = options.threads > 0 ? options.threads : tbb::info::default_concurrency();
  state_ = std::make_shared<const State>(backend, threads, options.workspace_cap);
}

std::string Context::backend() const { return state_->backend.info().name; }
int Context::threads() const { return state_->threads.count(); }
std::size_t Context::workspace_cap() const { return state_->workspace_cap; }

}  // namespace misa
