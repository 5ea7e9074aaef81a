// SPDX-License-Identifier: Apache-2.0
// Benchmarks of the CPU backend with the operations and bytes that each needs, and in the same run
// of a peer: oneDNN's bf16 matrix product of the same size as dense scoring.
//
// T = 256 queries, D = 128, top_k = 2048, causal rows at the end of the context.
#include <benchmark/benchmark.h>
#include <fmt/format.h>
#include <omp.h>

#include <algorithm>
#include <dnnl.hpp>
#include <map>
#include <memory>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "cpu/load.hpp"
#include "indexers/backend.hpp"
#include "misa/indexer.hpp"
#include "models.hpp"

namespace misa::bench {
namespace {

constexpr std::int64_t kQueries = 256;
constexpr std::int64_t kDim = 128;
constexpr int kTopK = 2048;

// Normal q, k and w; made once for each shape and shared.
struct Input {
  Shape shape;
  std::vector<std::byte> q;
  std::vector<std::byte> k;
  std::vector<float> scale;
  std::vector<float> w;
  std::vector<std::int32_t> ks;
  std::vector<std::int32_t> ke;

  Input(std::int64_t heads, std::int64_t keys, DType dtype)
      : shape{kQueries, heads, kDim, keys, dtype, dtype},
        q(random(kQueries * heads * kDim, dtype, 1)),
        k(random(keys * kDim, dtype, 2)),
        scale(static_cast<std::size_t>(keys), 0.01F),
        w(static_cast<std::size_t>(kQueries * heads)),
        ks(kQueries, 0),
        ke(kQueries) {
    std::mt19937 generator(3);
    std::normal_distribution<float> normal;
    std::ranges::generate(w, [&] { return normal(generator) * 0.01F; });
    std::iota(ke.begin(), ke.end(), static_cast<std::int32_t>(keys - kQueries + 1));
  }

  [[nodiscard]] Queries queries() const {
    return {q.data(), shape.q_dtype, kQueries, shape.heads, kDim};
  }
  [[nodiscard]] Weights weights() const { return {w.data(), kQueries, shape.heads}; }
  [[nodiscard]] RaggedKeys keys() const {
    return {k.data(),
            shape.k_dtype,
            shape.max_keys,
            kDim,
            0,
            shape.k_dtype == DType::e4m3 ? scale.data() : nullptr,
            ks,
            ke};
  }

  static std::vector<std::byte> random(std::int64_t count, DType dtype, unsigned seed) {
    std::mt19937 generator(seed);
    std::normal_distribution<float> normal;
    std::vector<std::byte> data(static_cast<std::size_t>(count) * size_of(dtype));
    for (std::int64_t i = 0; i < count; ++i) {
      const float value = normal(generator);
      switch (dtype) {
        case DType::f32: reinterpret_cast<float*>(data.data())[i] = value; break;
        case DType::bf16:
          reinterpret_cast<std::uint16_t*>(data.data())[i] = float_to_bf16(value);
          break;
        case DType::e4m3:
          reinterpret_cast<std::uint8_t*>(data.data())[i] = float_to_e4m3(100 * value);
          break;
      }
    }
    return data;
  }
};

const Input& input(std::int64_t heads, std::int64_t keys, DType dtype) {
  static std::map<std::tuple<std::int64_t, std::int64_t, DType>, std::unique_ptr<Input>> made;
  auto& entry = made[{heads, keys, dtype}];
  if (entry == nullptr) {
    entry = std::make_unique<Input>(heads, keys, dtype);
  }
  return *entry;
}

void report(benchmark::State& state, const Work& work) {
  const auto rate = [](double amount) {
    return benchmark::Counter(amount, benchmark::Counter::kIsIterationInvariantRate);
  };
  state.counters["GFLOP/s"] = rate(work.flops * 1e-9);
  state.counters["GB/s"] = rate(work.bytes * 1e-9);
}

// The peer: the dense products of scoring as bf16 matrix products of [T*H, D] by [D, L]. Every
// thread computes its own tiles, whose results overwrite each other in its cache: 1024 x 64 is the
// fastest tile of those tried (256 to 16384 rows, 64 to 4096 keys), and faster than oneDNN's own
// threads, which synchronise after every tile. The whole result would be T*H*L floats.
void matmul_onednn(benchmark::State& state, std::int64_t heads, std::int64_t keys) {
  using dnnl::memory;
  constexpr std::int64_t kRows = 1024;
  constexpr std::int64_t kKeys = 64;
  constexpr std::int64_t kElement = 2;
  const std::int64_t rows = kQueries * heads;
  dnnl::engine engine(dnnl::engine::kind::cpu, 0);
  const memory::desc a({kRows, kDim}, memory::data_type::bf16, memory::format_tag::ab);
  const memory::desc b({kDim, kKeys}, memory::data_type::bf16, memory::format_tag::ba);
  const memory::desc c({kRows, kKeys}, memory::data_type::f32, memory::format_tag::ab);
  const dnnl::matmul product(dnnl::matmul::primitive_desc(dnnl::matmul::desc(a, b, c), engine));
  const Input& in = input(heads, keys, DType::bf16);
  const Context context({.backend = "cpu"});
  for (auto _ : state) {
    context.state().threads.for_each(rows / kRows, [&](std::int64_t row_tile, int) {
      omp_set_num_threads(1);
      dnnl::stream stream(engine);
      auto* q_data = const_cast<std::byte*>(in.q.data()) + row_tile * kRows * kDim * kElement;
      auto* k_data = const_cast<std::byte*>(in.k.data());
      memory q(a, engine, q_data);
      memory k(b, engine, k_data);
      memory out(c, engine);
      for (std::int64_t key = 0; key < keys; key += kKeys) {
        k.set_data_handle(k_data + key * kDim * kElement);
        product.execute(stream, {{DNNL_ARG_SRC, q}, {DNNL_ARG_WEIGHTS, k}, {DNNL_ARG_DST, out}});
      }
      stream.wait();
    });
  }
  const auto pairs = static_cast<double>(rows) * static_cast<double>(keys);
  report(state, {pairs * 2 * kDim, static_cast<double>(rows + keys) * kDim * kElement});
}

// Dense scoring without selection: products, ReLU, weights and the sum over heads.
void score_dense(benchmark::State& state, std::int64_t heads, std::int64_t keys, DType dtype) {
  const Input& in = input(heads, keys, dtype);
  const Context context({.backend = "cpu"});
  const cpu::Kernels* kernels = nullptr;
  for (const cpu::Kernels* table : cpu::kernels()) {
    kernels = context.backend() == table->name ? table : kernels;
  }
  const IndexerConfig config = IndexerConfig::dsa(kTopK);
  Queries q = in.queries();
  q.head_stride = kDim;
  q.token_stride = heads * kDim;
  RaggedKeys k = in.keys();
  k.token_stride = kDim;
  const Problem problem{config, q, {in.w.data(), kQueries, heads, heads}, source_of(k), {}};
  const cpu::Operand operand =
      kernels->native_bf16 && dtype != DType::f32 ? cpu::Operand::bf16 : cpu::Operand::f32;
  const std::size_t row = size_of(operand) * kDim;
  std::vector<std::byte> rows(row * static_cast<std::size_t>(kQueries * heads));
  for (std::int64_t t = 0; t < kQueries; ++t) {
    cpu::load_heads(*kernels, problem, t, operand,
                    rows.data() + static_cast<std::int64_t>(row) * t * heads);
  }
  const std::vector<float> floor(static_cast<std::size_t>(heads), 0.0F);
  struct alignas(64) Scratch {
    std::byte tile[kPageSize * kDim * 4];
    std::byte pack[kPageSize * kDim * 4];
    float scores[kPageSize];
    cpu::Tile keys;
  };
  const Threads& threads = context.state().threads;
  std::vector<Scratch> scratch(static_cast<std::size_t>(threads.count()));
  constexpr std::int64_t kBlock = 64;  // queries per packed page, as in the backend
  for (auto _ : state) {
    threads.for_each(kQueries / kBlock, [&](std::int64_t block, int thread) {
      Scratch& local = scratch[thread];
      local.keys.data = local.tile;
      for (std::int64_t first = 0; first < keys; first += kPageSize) {
        cpu::load_page(*kernels, problem, 0, first, kPageSize, operand, local.pack, local.keys);
        for (std::int64_t t = block * kBlock; t < (block + 1) * kBlock; ++t) {
          const cpu::QueryRows query{rows.data() + static_cast<std::int64_t>(row) * t * heads,
                                     in.w.data() + t * heads, floor.data(),
                                     static_cast<int>(heads)};
          kernels->score(operand, query, local.keys, kPageSize, local.scores);
          benchmark::DoNotOptimize(local.scores[0]);
        }
      }
    });
  }
  report(state, score_work(kQueries, keys, heads, kDim, dtype));
}

// Selection alone, from scores in memory: the CPU backend's offers and compactions.
void select_only(benchmark::State& state, std::int64_t keys) {
  const Context context({.backend = "cpu", .threads = 1});
  const cpu::Kernels* kernels = nullptr;
  for (const cpu::Kernels* table : cpu::kernels()) {
    kernels = context.backend() == table->name ? table : kernels;
  }
  std::mt19937 generator(4);
  std::normal_distribution<float> normal;
  std::vector<float> scores(static_cast<std::size_t>(keys));
  std::ranges::generate(scores, [&] { return normal(generator); });
  const std::int64_t capacity = 2 * kTopK + 2 * cpu::kSelectorSlack;
  std::vector<std::uint64_t> entries(static_cast<std::size_t>(capacity));
  std::vector<std::uint64_t> scratch(static_cast<std::size_t>(capacity));
  std::uint32_t positions[kPageSize];
  for (auto _ : state) {
    cpu::Selector selector{entries.data(), 0, capacity, kTopK, 0};
    for (std::int64_t first = 0; first < keys; first += kPageSize) {
      std::iota(positions, positions + kPageSize, static_cast<std::uint32_t>(first));
      kernels->offer(scores.data() + first, positions, kPageSize, selector, scratch.data());
    }
    kernels->compact(selector, scratch.data());
    benchmark::DoNotOptimize(selector.count);
  }
  report(state, select_work(1, keys, kTopK));
}

void select_nth_element(benchmark::State& state, std::int64_t keys) {
  std::mt19937 generator(4);
  std::normal_distribution<float> normal;
  std::vector<float> scores(static_cast<std::size_t>(keys));
  std::ranges::generate(scores, [&] { return normal(generator); });
  std::vector<std::int32_t> order(static_cast<std::size_t>(keys));
  for (auto _ : state) {
    std::iota(order.begin(), order.end(), 0);
    std::nth_element(order.begin(), order.begin() + kTopK, order.end(),
                     [&](std::int32_t a, std::int32_t b) { return scores[a] > scores[b]; });
    benchmark::DoNotOptimize(order[0]);
  }
  report(state, select_work(1, keys, kTopK));
}

// A whole step: route, score, select and re-rank.
void step(benchmark::State& state, const IndexerConfig& config, std::int64_t heads,
          std::int64_t keys, DType dtype) {
  const Input& in = input(heads, keys, dtype);
  const Context context({.backend = "cpu"});
  const Plan plan(context, config, in.shape);
  std::vector<std::byte> memory(plan.workspace_bytes() + 64);
  void* aligned = memory.data();
  std::size_t space = memory.size();
  std::align(64, plan.workspace_bytes(), aligned, space);
  const std::span workspace(static_cast<std::byte*>(aligned), plan.workspace_bytes());
  std::vector<std::int32_t> indices(static_cast<std::size_t>(kQueries * config.top_k));
  const Selection out{indices, {}, {}, {}};
  for (auto _ : state) {
    plan.run(in.queries(), in.weights(), in.keys(), out, workspace);
  }
  report(state, step_work(config, in.shape));
  state.counters["us/query"] = benchmark::Counter(
      kQueries * 1e-6, benchmark::Counter::kIsIterationInvariantRate | benchmark::Counter::kInvert);
}

template <class Body>
void add(const std::string& name, Body body) {
  benchmark::RegisterBenchmark(name.c_str(), body)
      ->Unit(benchmark::kMillisecond)
      ->UseRealTime()
      ->Repetitions(5)
      ->ReportAggregatesOnly();
}

void register_all() {
  constexpr std::int64_t k64 = 65536;
  constexpr std::int64_t kHeads = 64;
  add("peer/onednn_matmul_bf16/H64/L64K", [](auto& s) { matmul_onednn(s, kHeads, k64); });
  add("score/dense/bf16/H64/L64K", [](auto& s) { score_dense(s, kHeads, k64, DType::bf16); });
  add("score/dense/e4m3/H64/L64K", [](auto& s) { score_dense(s, kHeads, k64, DType::e4m3); });
  add("select/2048/L64K", [](auto& s) { select_only(s, k64); });
  add("peer/nth_element/2048/L64K", [](auto& s) { select_nth_element(s, k64); });

  struct Named {
    const char* name;
    IndexerConfig config;
  };
  const std::vector<Named> indexers{
      {"dsa", IndexerConfig::dsa(kTopK)},
      {"misa_8", IndexerConfig::misa(kTopK, 8)},
      {"misa_dagger_8_m8192", IndexerConfig::misa_dagger(kTopK, 8, 8192)},
      {"misa_r_7+1", IndexerConfig::misa_r(kTopK, 7)},
      {"misa_r_3+1_m4096", IndexerConfig::misa_r(kTopK, 3, 2 * kTopK)},
      {"hisa", IndexerConfig::hisa(kTopK)},
  };
  for (const DType dtype : {DType::bf16, DType::e4m3}) {
    for (const std::int64_t keys : {std::int64_t{8192}, k64}) {
      for (const Named& indexer : indexers) {
        add(fmt::format("step/{}/{}/H64/L{}K", indexer.name, name_of(dtype), keys / 1024),
            [=](auto& s) { step(s, indexer.config, kHeads, keys, dtype); });
      }
    }
  }
}

}  // namespace
}  // namespace misa::bench

int main(int argc, char** argv) {
  misa::bench::register_all();
  benchmark::Initialize(&argc, argv);
  if (benchmark::ReportUnrecognizedArguments(argc, argv)) {
    return 2;
  }
  benchmark::AddCustomContext("misa", std::string(misa::version()));
  benchmark::AddCustomContext("backend", misa::Context({.backend = "cpu"}).backend());
  benchmark::RunSpecifiedBenchmarks();
  return 0;
}
