// SPDX-License-Identifier: Apache-2.0
// Times whole steps of the device plan: routing, scoring and selection of the last T queries of a
// context of L keys. peers.py times the dense step of other libraries on the same shapes.
//
// A figure is the median of 20 steps, after 5 that are not counted. The indexers of a shape take
// turns, step by step, in one stream with events between them. FLOP are those that an indexer
// cannot do without (bench/models.hpp). --stages times the stages of 20 further steps with events
// between them.
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <cstdint>
#include <functional>
#include <limits>
#include <list>
#include <nlohmann/json.hpp>
#include <random>
#include <string>
#include <vector>

#include "cuda/check.cuh"
#include "cuda/stages.hpp"
#include "gpu/device.hpp"
#include "gpu/variants.hpp"
#include "metrics.hpp"
#include "misa/cache.hpp"
#include "misa/cuda.hpp"
#include "models.hpp"
#include "options.hpp"
#include "variant.hpp"

namespace {

using misa::bench::Device;
using misa::cuda::check;

struct Options {
  std::string backend = "auto";
  std::vector<std::string> indexers{"dsa", "misa"};  // names that parse_variant accepts
  std::vector<std::int64_t> keys{65536};
  std::vector<std::int64_t> queries{2048};
  std::int64_t heads = 64;
  int top_k = 2048;
  std::size_t workspace = misa::kDefaultWorkspaceCap;
  std::uint64_t seed = std::random_device()();
  bool json = false;
  bool stages = false;
};

constexpr std::int64_t kDim = 128;

// e4m3 keys and queries of normal entries; a query's scale is folded into its weight.
struct Data {
  std::vector<std::uint8_t> q;
  std::vector<float> w;
  std::vector<std::uint8_t> k;
  std::vector<float> scale;
  std::vector<std::int32_t> starts;
  std::vector<std::int32_t> ends;

  Data(const Options& options, std::int64_t queries, std::int64_t keys) {
    std::mt19937_64 random(options.seed);
    std::normal_distribution<float> normal;
    std::vector<float> row(kDim);
    const auto quantised = [&](std::vector<std::uint8_t>& out) {
      std::generate(row.begin(), row.end(), [&] { return normal(random); });
      out.resize(out.size() + kDim);
      return misa::quantize(row, misa::ScaleFormat::f32, std::span(out).last(kDim));
    };
    for (std::int64_t i = 0; i < queries * options.heads; ++i) {
      w.push_back(quantised(q) * normal(random));
    }
    for (std::int64_t i = 0; i < keys; ++i) {
      scale.push_back(quantised(k));
    }
    for (std::int64_t t = 0; t < queries; ++t) {
      starts.push_back(0);
      ends.push_back(static_cast<std::int32_t>(keys - queries + t + 1));
    }
  }
};

struct StageTime {
  std::string name;
  double median;  // microseconds per step
};

struct Result {
  std::string backend;
  double median;
  double low;   // 10th percentile
  double high;  // 90th
  double tflops;
  std::size_t workspace;
  std::vector<StageTime> stages;
};

constexpr int kWarmUp = 5;
constexpr int kRuns = 20;

double microseconds_between(cudaEvent_t from, cudaEvent_t to) {
  float milliseconds = 0;
  check(cudaEventElapsedTime(&milliseconds, from, to), "cudaEventElapsedTime");
  return 1e3 * double{milliseconds};
}

// The times of every step [step, run].
std::vector<std::vector<double>> microseconds(const std::vector<std::function<void()>>& steps) {
  std::vector<cudaEvent_t> events(kRuns * steps.size() + 1);
  for (cudaEvent_t& event : events) {
    check(cudaEventCreate(&event), "cudaEventCreate");
  }
  for (int i = 0; i < kWarmUp; ++i) {
    for (const auto& enqueue : steps) {
      enqueue();
    }
  }
  auto next = events.begin();
  check(cudaEventRecord(*next, nullptr), "cudaEventRecord");
  for (int i = 0; i < kRuns; ++i) {
    for (const auto& enqueue : steps) {
      enqueue();
      check(cudaEventRecord(*++next, nullptr), "cudaEventRecord");
    }
  }
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");
  std::vector<std::vector<double>> times(steps.size());
  for (std::size_t i = 0; i + 1 < events.size(); ++i) {
    times[i % steps.size()].push_back(microseconds_between(events[i], events[i + 1]));
  }
  for (const cudaEvent_t event : events) {
    check(cudaEventDestroy(event), "cudaEventDestroy");
  }
  return times;
}

// The stages of a step in order; the times of a stage in several chunks are added up.
std::vector<StageTime> stage_times(const std::function<void()>& enqueue) {
  struct Mark {
    int run;
    const char* stage;  // the stage that begins; null at the end of the step
    cudaEvent_t event;
  };
  std::vector<Mark> marks;
  int run = 0;
  misa::cuda::stage_listener = [&](const char* stage) {
    cudaEvent_t event = nullptr;
    check(cudaEventCreate(&event), "cudaEventCreate");
    check(cudaEventRecord(event, nullptr), "cudaEventRecord");
    marks.push_back({run, stage, event});
  };
  for (; run < kRuns; ++run) {
    enqueue();
  }
  misa::cuda::stage_listener = nullptr;
  check(cudaDeviceSynchronize(), "cudaDeviceSynchronize");

  std::vector<std::string> names;
  std::vector<std::vector<double>> times;  // [stage, run]
  for (std::size_t i = 0; i < marks.size(); ++i) {
    const auto& [at_run, stage, event] = marks[i];
    if (stage != nullptr) {
      const auto at = std::find(names.begin(), names.end(), stage) - names.begin();
      if (at == std::ssize(names)) {
        names.emplace_back(stage);
        times.emplace_back(kRuns);
      }
      times[at][at_run] += microseconds_between(event, marks[i + 1].event);
    }
  }
  for (const Mark& mark : marks) {
    check(cudaEventDestroy(mark.event), "cudaEventDestroy");
  }
  std::vector<StageTime> stages;
  for (std::size_t i = 0; i < names.size(); ++i) {
    stages.push_back({names[i], misa::cli::quantile(times[i], 0.5)});
  }
  return stages;
}

// A plan with what it writes to.
struct Step {
  misa::cuda::Plan plan;
  Device<std::int32_t> indices;
  Device<std::byte> workspace;

  Step(const misa::IndexerConfig& config, const misa::Shape& shape, const Options& options)
      : plan(config, shape, {shape.max_keys, options.workspace, options.backend}),
        indices(static_cast<std::size_t>(shape.tokens * config.top_k)),
        workspace(plan.workspace_bytes()) {}
};

// A result for every variant, in their order.
std::vector<Result> time_steps(const std::vector<misa::cli::Variant>& variants,
                               const Options& options, const Data& data) {
  const auto keys = static_cast<std::int64_t>(data.scale.size());
  const auto queries = static_cast<std::int64_t>(data.starts.size());
  const misa::Shape shape{queries, options.heads, kDim, keys, misa::DType::e4m3, misa::DType::e4m3};
  const Device<std::uint8_t> q(data.q);
  const Device<float> w(data.w);
  const Device<std::uint8_t> k(data.k);
  const Device<float> scale(data.scale);
  const Device<std::int32_t> starts(data.starts);
  const Device<std::int32_t> ends(data.ends);
  std::list<Step> steps;
  std::vector<std::function<void()>> enqueue;
  for (const misa::cli::Variant& variant : variants) {
    Step& step = steps.emplace_back(variant.config, shape, options);
    enqueue.emplace_back([&] {
      step.plan.run(
          {q.data(), misa::DType::e4m3, queries, options.heads, kDim},
          {w.data(), queries, options.heads},
          {k.data(), misa::DType::e4m3, keys, kDim, 0, scale.data(), starts.span(), ends.span()},
          {step.indices.span(), {}, {}, {}}, step.workspace.span(), nullptr);
    });
  }
  const std::vector<std::vector<double>> times = microseconds(enqueue);
  std::vector<Result> results;
  for (const Step& step : steps) {
    const std::size_t i = results.size();
    const double median = misa::cli::quantile(times[i], 0.5);
    results.push_back({std::string(step.plan.backend()), median, misa::cli::quantile(times[i], 0.1),
                       misa::cli::quantile(times[i], 0.9),
                       misa::bench::step_work(variants[i].config, shape).flops / median * 1e-6,
                       step.plan.workspace_bytes(),
                       options.stages ? stage_times(enqueue[i]) : std::vector<StageTime>{}});
  }
  return results;
}

void run(const Options& options) {
  const std::vector<misa::cli::Variant> variants =
      misa::bench::variants_of(options.indexers, options.top_k);
  nlohmann::ordered_json list = nlohmann::ordered_json::array();
  if (!options.json) {
    fmt::print("{} heads, top {}, seed {}\n{:22} {:>7} {:>8} {:>6} {:>7} {:>10} {:>20} {:>9}\n",
               options.heads, options.top_k, options.seed, "indexer", "queries", "keys", "routed",
               "re-rank", "us", "10 % - 90 %", "TFLOP/s");
  }
  const auto add = [&](const misa::cli::Variant& variant, std::int64_t queries, std::int64_t keys,
                       const Result& result) {
    const misa::IndexerConfig& config = variant.config;
    if (options.json) {
      nlohmann::ordered_json stages = nlohmann::ordered_json::object();
      for (const StageTime& stage : result.stages) {
        stages[stage.name] = stage.median;
      }
      list.push_back({{"indexer", variant.name},
                      {"backend", result.backend},
                      {"queries", queries},
                      {"heads", options.heads},
                      {"keys", keys},
                      {"top_k", config.top_k},
                      {"routed", config.heads},
                      {"candidates", config.candidates},
                      {"us", result.median},
                      {"us_low", result.low},
                      {"us_high", result.high},
                      {"tflops", result.tflops},
                      {"workspace", result.workspace},
                      {"stages", stages},
                      {"seed", options.seed}});
    } else {
      fmt::print("{:22} {:7} {:8} {:6} {:7} {:10.1f} {:9.1f} -{:9.1f} {:9.1f}\n", variant.name,
                 queries, keys, config.heads, config.candidates, result.median, result.low,
                 result.high, result.tflops);
      for (const StageTime& stage : result.stages) {
        fmt::print("  {:22} {:38.1f}\n", stage.name, stage.median);
      }
    }
  };
  for (const std::int64_t queries : options.queries) {
    for (const std::int64_t keys : options.keys) {
      const Data data(options, queries, keys);
      const std::vector<Result> results = time_steps(variants, options, data);
      for (std::size_t i = 0; i < variants.size(); ++i) {
        add(variants[i], queries, keys, results[i]);
      }
    }
  }
  if (options.json) {
    fmt::print("{}\n", list.dump(2));
  }
}

}  // namespace

int main(int argc, char** argv) {
  Options options;
  CLI::App app("Times whole steps of the device plan on random e4m3 data");
  app.add_option("--backend", options.backend, "a CUDA backend's name, or auto");
  app.add_option("--indexers", options.indexers, std::string(misa::cli::kVariantHelp));
  const CLI::Validator size = misa::cli::size_number(1, std::numeric_limits<std::int32_t>::max());
  app.add_option("--keys", options.keys, "L; 64K is 65536")->transform(size);
  app.add_option("--queries", options.queries, "T; 2K is 2048")->transform(size);
  app.add_option("--heads", options.heads, "H");
  app.add_option("--top-k", options.top_k, "positions wanted a query")->transform(size);
  app.add_option("--workspace", options.workspace, "bytes");
  app.add_option("--seed", options.seed, "of the data; random unless given");
  app.add_flag("--stages", options.stages, "also the time of every stage");
  app.add_flag("--json", options.json, "print JSON");
  CLI11_PARSE(app, argc, argv);
  try {
    run(options);
  } catch (const std::exception& error) {
    fmt::print(stderr, "misa_bench_step: {}\n", error.what());
    return 1;
  }
  return 0;
}
