// SPDX-License-Identifier: Apache-2.0
// Times steps of decode: the device plan on the pages of a key cache, for a batch of sequences of
// equal length. peers.py --decode times the dense step of other libraries on the same shapes, in
// turn with this program if it is named.
//
// - Steps are replayed from a CUDA graph, which takes all caches in turn: so many that each is gone
//   from L2 when its turn comes again. A figure is the time of a replay divided by its steps, the
//   median of --replays after 3 that are not counted. Indexers take turns, replay by replay, those
//   with a sketch among each other, as a page has the codes of one.
// - Keys are random and never zero. Pages are shuffled, their stride has room for their tails, and
//   a row of the block table is as wide as --table tokens. Page sums stand in the tails, and the
//   sketch that an indexer reads.
// - GB/s counts the bytes of all keys and their scales once, whatever the indexer reads.
// - --stages captures a second graph with events between the stages, which keep the kernels of
//   different stages from overlapping.
//
// A shape whose caches do not fit the device's memory is left out.
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <cstdint>
#include <functional>
#include <list>
#include <map>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "cuda/check.cuh"
#include "cuda/stages.hpp"
#include "gpu/device.hpp"
#include "gpu/variants.hpp"
#include "metrics.hpp"
#include "misa/cache.hpp"
#include "misa/cuda.hpp"
#include "options.hpp"
#include "variant.hpp"

namespace {

using misa::bench::Device;
using misa::cuda::check;

struct Options {
  std::string backend = "auto";
  std::vector<std::string> indexers{"dsa", "misa"};  // names that parse_variant accepts
  std::vector<std::int64_t> batches{64};
  std::vector<std::int64_t> contexts{131072};
  std::vector<std::int64_t> next_n{1};
  std::int64_t heads = 64;
  int top_k = 2048;
  std::int64_t page_stride = 0;  // 0: the least with sums and a sketch, of 2 bits or more
  std::int64_t table = 1 << 20;
  bool without_tail = false;
  std::size_t workspace = misa::kDefaultWorkspaceCap;
  int replays = 20;
  std::uint64_t seed = std::random_device()();
  bool json = false;
  bool stages = false;
};

constexpr std::int64_t kDim = 128;
constexpr std::int64_t kPage = 64;
constexpr std::int64_t kPageElements = kPage * kDim;
constexpr std::int64_t kKeyBytes = kDim + 4;

// Before a cache is read again, this many bytes of other keys are read: twice the L2 of an H200.
constexpr std::int64_t kColdBytes = 100'000'000;
constexpr std::int64_t kMostCaches = 256;
constexpr std::int64_t kLeastSteps = 8;  // of a graph
constexpr int kWarmUp = 3;

struct Shape {
  std::int64_t batch;
  std::int64_t context;
  std::int64_t next_n;

  [[nodiscard]] std::int64_t pages() const { return batch * ((context + kPage - 1) / kPage); }
  [[nodiscard]] std::int64_t key_bytes() const { return batch * context * kKeyBytes; }
  [[nodiscard]] std::int64_t tokens() const { return batch * next_n; }
};

// Rows of normal entries in e4m3 with their scales.
class RandomRows {
 public:
  explicit RandomRows(std::uint64_t seed) : random_(seed) {}

  // Appends a row; returns its scale.
  float append_to(std::vector<std::uint8_t>& rows) {
    std::generate(row_.begin(), row_.end(), [&] { return normal_(random_); });
    rows.resize(rows.size() + kDim);
    return misa::quantize(row_, misa::ScaleFormat::f32, std::span(rows).last(kDim));
  }
  float weight() { return normal_(random_); }

 private:
  std::mt19937_64 random_;
  std::normal_distribution<float> normal_;
  std::vector<float> row_ = std::vector<float>(kDim);
};

// As many caches as the memory has room for, at most those that a cold L2 needs; 0: the shape does
// not fit. One alone will do if it is far larger than L2.
std::int64_t caches_for(const Shape& shape, const Options& options) {
  std::size_t free = 0;
  std::size_t total = 0;
  check(cudaMemGetInfo(&free, &total), "cudaMemGetInfo");
  constexpr std::int64_t kReserve = std::int64_t{1} << 30;  // for queries, outputs, modules
  const std::int64_t room =
      static_cast<std::int64_t>(free) - kReserve - static_cast<std::int64_t>(options.workspace);
  const std::int64_t bytes =
      shape.pages() * options.page_stride + shape.batch * (options.table / kPage) * std::int64_t{4};
  const std::int64_t fit = std::max<std::int64_t>(room, 0) / bytes;
  const std::int64_t wanted = 1 + (kColdBytes + shape.key_bytes() - 1) / shape.key_bytes();
  const std::int64_t least = shape.key_bytes() >= 4 * kColdBytes ? 1 : 2;
  const std::int64_t caches = std::min({fit, wanted, kMostCaches});
  return caches >= least ? caches : 0;
}

// The caches of a shape: one pool of pages, of which each cache has others.
class Caches {
 public:
  Caches(const Shape& shape, std::int64_t count, const Options& options)
      : shape_(shape),
        count_(count),
        stride_(options.page_stride),
        width_(options.table / kPage),
        data_(static_cast<std::size_t>(pages() * stride_)),
        tables_(block_tables(options.seed)),
        lengths_(std::vector<std::int32_t>(shape.batch, static_cast<std::int32_t>(shape.context))) {
    fill(options.seed);
  }

  [[nodiscard]] std::int64_t count() const { return count_; }

  // Writes what is derived from the keys into the tails, unless it is there, and tells the views of
  // it: sums and, unless `sketch_bits` is 0, a sketch.
  void derive(int sketch_bits) {
    if (span_.data != nullptr && span_.sketch_bits == sketch_bits) {
      return;
    }
    misa::CacheSpan span = bare();
    span.sketch_bits = sketch_bits;
    span_ = misa::with_tail(span);
    std::vector<std::int32_t> all(static_cast<std::size_t>(pages()));
    std::iota(all.begin(), all.end(), 0);
    const Device<std::int32_t> on_device(all);
    misa::cuda::rebuild(span_, on_device.span(), {}, nullptr);
    check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  }
  void derive_nothing() { span_ = bare(); }

  [[nodiscard]] misa::PagedKeys keys(std::int64_t cache) const {
    misa::PagedKeys keys;
    keys.cache.data = span_.data;
    keys.cache.pages = span_.pages;
    keys.cache.dim = span_.dim;
    keys.cache.page_stride = span_.page_stride;
    keys.cache.page_sums = span_.page_sums;
    keys.cache.page_sums_stride = span_.page_sums_stride;
    keys.cache.largest_scales = span_.largest_scales;
    keys.cache.largest_scales_stride = span_.largest_scales_stride;
    keys.cache.sketch = span_.sketch;
    keys.cache.sketch_bits = span_.sketch_bits;
    keys.cache.sketch_stride = span_.sketch_stride;
    keys.block_table = tables_.data() + cache * shape_.batch * width_;
    keys.max_pages = width_;
    keys.context_lens = lengths_.span();
    keys.next_n = shape_.next_n;
    return keys;
  }

 private:
  [[nodiscard]] std::int64_t pages() const { return count_ * shape_.pages(); }

  [[nodiscard]] misa::CacheSpan bare() const {
    misa::CacheSpan span;
    span.data = data_.data();
    span.pages = pages();
    span.dim = kDim;
    span.page_stride = stride_;
    return span;
  }

  [[nodiscard]] std::vector<std::int32_t> block_tables(std::uint64_t seed) const {
    std::vector<std::int32_t> order(static_cast<std::size_t>(pages()));
    std::iota(order.begin(), order.end(), 0);
    std::mt19937_64 random(seed);
    std::shuffle(order.begin(), order.end(), random);
    const std::int64_t each = shape_.pages() / shape_.batch;
    std::vector<std::int32_t> tables(static_cast<std::size_t>(count_ * shape_.batch * width_), -1);
    for (std::int64_t row = 0; row < count_ * shape_.batch; ++row) {
      std::copy_n(order.begin() + row * each, each, tables.begin() + row * width_);
    }
    return tables;
  }

  // The elements of pages repeat, but every key has a scale of its own.
  void fill(std::uint64_t seed) {
    constexpr std::int64_t kDrawn = 512;           // pages
    constexpr std::int64_t kScalePages = 1 << 16;  // whose scales are drawn at once
    RandomRows rows(seed);
    std::vector<std::uint8_t> elements;
    float scale = 0;
    for (std::int64_t i = 0; i < kDrawn * kPage; ++i) {
      scale = rows.append_to(elements);
    }
    const Device<std::uint8_t> drawn(elements);
    for (std::int64_t first = 0; first < pages(); first += kDrawn) {
      copy_2d(first * stride_, drawn.data(), kPageElements, std::min(kDrawn, pages() - first),
              cudaMemcpyDeviceToDevice);
    }
    std::mt19937 random(static_cast<std::uint32_t>(seed));
    std::uniform_real_distribution<float> factor(0.5F, 1.5F);
    std::vector<float> scales(static_cast<std::size_t>(std::min(kScalePages, pages()) * kPage));
    for (std::int64_t first = 0; first < pages(); first += kScalePages) {
      std::generate(scales.begin(), scales.end(), [&] { return scale * factor(random); });
      copy_2d(first * stride_ + kPageElements, scales.data(), kPage * std::int64_t{sizeof(float)},
              std::min(kScalePages, pages() - first), cudaMemcpyHostToDevice);
    }
  }

  // Copies dense rows to one place of consecutive pages.
  void copy_2d(std::int64_t offset, const void* from, std::int64_t row_bytes, std::int64_t rows,
               cudaMemcpyKind kind) const {
    check(cudaMemcpy2D(data_.data() + offset, static_cast<std::size_t>(stride_), from,
                       static_cast<std::size_t>(row_bytes), static_cast<std::size_t>(row_bytes),
                       static_cast<std::size_t>(rows), kind),
          "cudaMemcpy2D");
  }

  Shape shape_;
  std::int64_t count_;
  std::int64_t stride_;
  std::int64_t width_;
  Device<std::uint8_t> data_;
  Device<std::int32_t> tables_;
  Device<std::int32_t> lengths_;
  misa::CacheSpan span_;
};

struct Queries {
  std::vector<std::uint8_t> q;
  std::vector<float> w;

  Queries(std::int64_t count, std::uint64_t seed) {
    RandomRows rows(seed + 1);
    for (std::int64_t i = 0; i < count; ++i) {
      const float scale = rows.append_to(q);
      w.push_back(scale * rows.weight());
    }
  }
};

double microseconds_between(cudaEvent_t from, cudaEvent_t to) {
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, from, to), "cudaEventElapsedTime");
  return 1e3 * double{milliseconds};
}

class Event {
 public:
  Event() { check(cudaEventCreate(&event_), "cudaEventCreate"); }
  ~Event() { cudaEventDestroy(event_); }
  Event(Event&& other) noexcept : event_(std::exchange(other.event_, nullptr)) {}
  Event(const Event&) = delete;
  Event& operator=(const Event&) = delete;
  Event& operator=(Event&&) = delete;

  [[nodiscard]] cudaEvent_t get() const { return event_; }

 private:
  cudaEvent_t event_ = nullptr;
};

class Stream {
 public:
  Stream() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreate");
  }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  [[nodiscard]] cudaStream_t get() const { return stream_; }
  void record(const Event& event) const {
    check(cudaEventRecord(event.get(), stream_), "cudaEventRecord");
  }
  void wait() const { check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize"); }

 private:
  cudaStream_t stream_ = nullptr;
};

// A graph that is captured from a stream and replayed on it.
class Graph {
 public:
  Graph(const Stream& stream, const std::function<void(cudaStream_t)>& enqueue) : stream_(stream) {
    check(cudaStreamBeginCapture(stream.get(), cudaStreamCaptureModeThreadLocal),
          "begin of capture");
    enqueue(stream.get());
    cudaGraph_t graph = nullptr;
    check(cudaStreamEndCapture(stream.get(), &graph), "end of capture");
    check(cudaGraphInstantiate(&executable_, graph, 0), "cudaGraphInstantiate");
    check(cudaGraphDestroy(graph), "cudaGraphDestroy");
  }
  ~Graph() { cudaGraphExecDestroy(executable_); }
  Graph(const Graph&) = delete;
  Graph& operator=(const Graph&) = delete;

  void replay() const { check(cudaGraphLaunch(executable_, stream_.get()), "cudaGraphLaunch"); }

 private:
  const Stream& stream_;
  cudaGraphExec_t executable_ = nullptr;
};

struct StageTime {
  std::string name;
  double median;  // microseconds per step
};

struct Result {
  std::string backend;
  double median;  // microseconds per step
  double low;     // 10th percentile
  double high;    // 90th
  std::size_t workspace;
  std::vector<StageTime> stages;
};

// Enqueues the step that reads the cache with this number.
using EnqueueStep = std::function<void(std::int64_t cache, cudaStream_t stream)>;

// The times of each indexer's step [indexer, replay], in microseconds.
std::vector<std::vector<double>> step_times(const std::vector<EnqueueStep>& indexers,
                                            std::int64_t caches, int replays) {
  const std::int64_t steps = (kLeastSteps + caches - 1) / caches * caches;
  const Stream stream;
  std::list<Graph> graphs;
  for (const EnqueueStep& enqueue : indexers) {
    graphs.emplace_back(stream, [&](cudaStream_t capturing) {
      for (std::int64_t i = 0; i < steps; ++i) {
        enqueue(i % caches, capturing);
      }
    });
  }
  for (int i = 0; i < kWarmUp; ++i) {
    for (const Graph& graph : graphs) {
      graph.replay();
    }
  }
  const std::vector<Event> events(static_cast<std::size_t>(replays) * indexers.size() + 1);
  auto next = events.begin();
  stream.record(*next);
  for (int i = 0; i < replays; ++i) {
    for (const Graph& graph : graphs) {
      graph.replay();
      stream.record(*++next);
    }
  }
  stream.wait();
  std::vector<std::vector<double>> times(indexers.size());
  for (std::size_t i = 0; i + 1 < events.size(); ++i) {
    times[i % indexers.size()].push_back(
        microseconds_between(events[i].get(), events[i + 1].get()) / static_cast<double>(steps));
  }
  return times;
}

// The stages of a step in order; the times of a stage in several chunks are added up.
std::vector<StageTime> stage_times(const EnqueueStep& enqueue, std::int64_t caches, int replays) {
  struct Mark {
    std::int64_t step;
    const char* stage;  // the stage that begins; null at the end of the step
    Event event;
  };
  constexpr std::int64_t kMostSteps = 32;
  const std::int64_t steps = std::min(kMostSteps, (kLeastSteps + caches - 1) / caches * caches);
  std::vector<Mark> marks;
  const Stream stream;
  const Graph graph(stream, [&](cudaStream_t capturing) {
    std::int64_t step = 0;
    misa::cuda::stage_listener = [&](const char* stage) {
      marks.push_back({step, stage, {}});
      check(cudaEventRecordWithFlags(marks.back().event.get(), capturing, cudaEventRecordExternal),
            "cudaEventRecordWithFlags");
    };
    for (; step < steps; ++step) {
      enqueue(step % caches, capturing);
    }
    misa::cuda::stage_listener = nullptr;
  });

  std::vector<std::string> names;
  std::vector<std::vector<double>> times;  // [stage, replay and step]
  for (int replay = -kWarmUp; replay < replays; ++replay) {
    graph.replay();
    stream.wait();
    for (std::size_t i = 0; replay >= 0 && i < marks.size(); ++i) {
      const Mark& mark = marks[i];
      if (mark.stage != nullptr) {
        const auto at = std::find(names.begin(), names.end(), mark.stage) - names.begin();
        if (at == std::ssize(names)) {
          names.emplace_back(mark.stage);
          times.emplace_back(static_cast<std::size_t>(replays * steps));
        }
        times[at][replay * steps + mark.step] +=
            microseconds_between(mark.event.get(), marks[i + 1].event.get());
      }
    }
  }
  std::vector<StageTime> stages;
  for (std::size_t i = 0; i < names.size(); ++i) {
    stages.push_back({names[i], misa::cli::quantile(times[i], 0.5)});
  }
  return stages;
}

// A result, or why there is none.
struct Outcome {
  std::optional<Result> result;
  std::string left_out;
};

// What does not fit, or has no kernels, leaves out one indexer and not all.
template <class Body>
void or_left_out(Outcome& outcome, const Body& body) {
  try {
    body();
  } catch (const misa::Error& error) {
    if (error.code() != misa::ErrorCode::unsupported &&
        error.code() != misa::ErrorCode::workspace) {
      throw;
    }
    outcome.left_out = error.what();
  }
}

// A plan with what it writes to, and what comes of it.
struct Step {
  Outcome* outcome;
  misa::cuda::Plan plan;
  Device<std::int32_t> indices;

  Step(Outcome* of, const misa::IndexerConfig& config, const misa::Shape& shape,
       const misa::cuda::PlanOptions& options)
      : outcome(of),
        plan(config, shape, options),
        indices(static_cast<std::size_t>(shape.tokens * config.top_k)) {}
};

// Times these indexers in turn and writes what comes of each. The caches have the sketch that they
// read.
void time_steps(const std::vector<std::pair<const misa::IndexerConfig*, Outcome*>>& indexers,
                const Options& options, const Shape& shape, const Caches& caches,
                const Device<std::uint8_t>& q, const Device<float>& w) {
  const misa::Shape bounds{shape.tokens(), options.heads,     kDim,
                           shape.context,  misa::DType::e4m3, misa::DType::e4m3};
  misa::cuda::PlanOptions plan_options;
  plan_options.workspace_cap = options.workspace;
  plan_options.backend = options.backend;
  plan_options.batch = shape.batch;
  std::list<Step> steps;
  std::size_t bytes = 0;
  for (const auto& [config, outcome] : indexers) {
    or_left_out(*outcome, [&, config = config, outcome = outcome] {
      const Step& step = steps.emplace_back(outcome, *config, bounds, plan_options);
      bytes = std::max(bytes, step.plan.workspace_bytes());
    });
  }
  const Device<std::byte> workspace(bytes);  // which steps of one stream can share
  std::vector<EnqueueStep> enqueue;
  for (auto step = steps.begin(); step != steps.end();) {
    enqueue.emplace_back([&, step](std::int64_t cache, cudaStream_t stream) {
      step->plan.run({q.data(), misa::DType::e4m3, shape.tokens(), options.heads, kDim},
                     {w.data(), shape.tokens(), options.heads}, caches.keys(cache),
                     {step->indices.span(), {}, {}, {}}, workspace.span(), stream);
    });
    or_left_out(*step->outcome, [&] {
      enqueue.back()(0, nullptr);  // loads modules, and fails here rather than in a replay
      check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
    });
    if (step->outcome->left_out.empty()) {
      ++step;
    } else {
      enqueue.pop_back();
      step = steps.erase(step);
    }
  }
  if (steps.empty()) {
    return;
  }
  const auto times = step_times(enqueue, caches.count(), options.replays);
  std::size_t i = 0;
  for (const Step& step : steps) {
    step.outcome->result = {std::string(step.plan.backend()),
                            misa::cli::quantile(times[i], 0.5),
                            misa::cli::quantile(times[i], 0.1),
                            misa::cli::quantile(times[i], 0.9),
                            step.plan.workspace_bytes(),
                            options.stages
                                ? stage_times(enqueue[i], caches.count(), options.replays)
                                : std::vector<StageTime>{}};
    ++i;
  }
}

// Prints a line of the table, or keeps an entry of the list.
class Report {
 public:
  explicit Report(const Options& options) : options_(options) {
    if (!options.json) {
      fmt::print(
          "{} heads, top {}, pages {} bytes apart, block tables of {} tokens, {}, seed {}\n"
          "{:28} {:>6} {:>8} {:>6} {:>6} {:>9} {:>18} {:>7}\n",
          options.heads, options.top_k, options.page_stride, options.table,
          options.without_tail ? "nothing in their tails" : "page sums in their tails",
          options.seed, "indexer", "batch", "context", "next_n", "caches", "us", "10 % - 90 %",
          "GB/s");
    }
  }

  void add(const std::string& indexer, const Shape& shape, std::int64_t caches,
           const Result& result) {
    const double gbps = static_cast<double>(shape.key_bytes()) / result.median * 1e-3;
    if (!options_.json) {
      fmt::print("{:28} {:6} {:8} {:6} {:6} {:9.1f} {:8.1f} -{:8.1f} {:7.0f}\n", indexer,
                 shape.batch, shape.context, shape.next_n, caches, result.median, result.low,
                 result.high, gbps);
      for (const StageTime& stage : result.stages) {
        fmt::print("  {:26} {:38.1f}\n", stage.name, stage.median);
      }
      return;
    }
    nlohmann::ordered_json stages = nlohmann::ordered_json::object();
    for (const StageTime& stage : result.stages) {
      stages[stage.name] = stage.median;
    }
    nlohmann::ordered_json entry = entry_of(indexer, shape);
    entry.update({{"backend", result.backend},
                  {"caches", caches},
                  {"us", result.median},
                  {"us_low", result.low},
                  {"us_high", result.high},
                  {"gbps", gbps},
                  {"workspace", result.workspace},
                  {"stages", stages}});
    list_.push_back(entry);
  }

  void leave_out(const std::string& indexer, const Shape& shape, const std::string& reason) {
    if (!options_.json) {
      fmt::print("{:28} {:6} {:8} {:6} left out: {}\n", indexer, shape.batch, shape.context,
                 shape.next_n, reason);
      return;
    }
    nlohmann::ordered_json entry = entry_of(indexer, shape);
    entry["left_out"] = reason;
    list_.push_back(entry);
  }

  void end() const {
    if (options_.json) {
      fmt::print("{}\n", list_.dump(2));
    }
  }

 private:
  [[nodiscard]] nlohmann::ordered_json entry_of(const std::string& indexer,
                                                const Shape& shape) const {
    return {{"indexer", indexer},
            {"batch", shape.batch},
            {"context", shape.context},
            {"next_n", shape.next_n},
            {"heads", options_.heads},
            {"top_k", options_.top_k},
            {"page_stride", options_.page_stride},
            {"tail", !options_.without_tail},
            {"seed", options_.seed}};
  }

  const Options& options_;
  nlohmann::ordered_json list_ = nlohmann::ordered_json::array();
};

void run_shape(const Options& options, const std::vector<misa::cli::Variant>& variants,
               const Shape& shape, Report& report) {
  const std::int64_t count = caches_for(shape, options);
  if (count == 0) {
    for (const misa::cli::Variant& variant : variants) {
      report.leave_out(variant.name, shape,
                       fmt::format("a cache takes {} MB, more than the device has free for two",
                                   shape.pages() * options.page_stride / 1'000'000));
    }
    return;
  }
  Caches caches(shape, count, options);
  const Queries queries(shape.tokens() * options.heads, options.seed);
  const Device<std::uint8_t> q(queries.q);
  const Device<float> w(queries.w);
  std::vector<Outcome> outcomes(variants.size());
  std::map<int, std::vector<std::pair<const misa::IndexerConfig*, Outcome*>>> by_sketch;
  for (std::size_t i = 0; i < variants.size(); ++i) {
    by_sketch[variants[i].config.sketch].emplace_back(&variants[i].config, &outcomes[i]);
  }
  for (const auto& [bits, indexers] : by_sketch) {
    options.without_tail ? caches.derive_nothing() : caches.derive(bits);
    time_steps(indexers, options, shape, caches, q, w);
  }
  for (std::size_t i = 0; i < variants.size(); ++i) {
    if (outcomes[i].result) {
      report.add(variants[i].name, shape, count, *outcomes[i].result);
    } else {
      report.leave_out(variants[i].name, shape, outcomes[i].left_out);
    }
  }
}

void run(const Options& options, const std::vector<misa::cli::Variant>& variants) {
  Report report(options);
  for (const std::int64_t batch : options.batches) {
    for (const std::int64_t context : options.contexts) {
      for (const std::int64_t next_n : options.next_n) {
        run_shape(options, variants, {batch, context, next_n}, report);
      }
    }
  }
  report.end();
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("Times steps of decode on a paged cache of random e4m3 keys");
  const CLI::Validator size = misa::cli::size_number(1, std::int64_t{1} << 20);
  app.add_option("--backend", options.backend, "a CUDA backend's name, or auto");
  app.add_option("--indexers", options.indexers, std::string(misa::cli::kVariantHelp));
  app.add_option("--batch", options.batches, "B: sequences")->transform(size);
  app.add_option("--context", options.contexts, "L: keys of a sequence; 64K is 65536")
      ->transform(size);
  app.add_option("--next-n", options.next_n, "queries of a sequence")->transform(size);
  app.add_option("--heads", options.heads, "H");
  app.add_option("--top-k", options.top_k, "positions wanted a query")->transform(size);
  app.add_option("--page-stride", options.page_stride,
                 "bytes from one page to the next; by default those of a page with its tail");
  app.add_option("--table", options.table, "tokens of a row of the block table")->transform(size);
  app.add_flag("--no-tail", options.without_tail, "the cache keeps no page sums and no sketch");
  app.add_option("--workspace", options.workspace, "bytes");
  app.add_option("--replays", options.replays, "of a graph that count")->transform(size);
  app.add_option("--seed", options.seed, "of the data; random unless given");
  app.add_flag("--stages", options.stages, "also the time of every stage");
  app.add_flag("--json", options.json, "print JSON");
  CLI11_PARSE(app, argc, argv);
  try {
    const std::int64_t longest = std::ranges::max(options.contexts);
    if (options.table < longest || options.table % kPage != 0) {
      throw misa::Error(misa::ErrorCode::invalid_argument,
                        fmt::format("--table: expected a multiple of {}, at least {} (--context), "
                                    "got {}",
                                    kPage, longest, options.table));
    }
    const std::vector<misa::cli::Variant> variants =
        misa::bench::variants_of(options.indexers, options.top_k);
    if (options.page_stride == 0) {
      int sketch_bits = 2;
      for (const misa::cli::Variant& variant : variants) {
        sketch_bits = std::max(sketch_bits, variant.config.sketch);
      }
      options.page_stride = misa::page_tail(kDim, kPage, sketch_bits).page_stride;
    }
    run(options, variants);
  } catch (const std::exception& error) {
    fmt::print(stderr, "misa_bench_decode: {}\n", error.what());
    return 1;
  }
  return 0;
}
