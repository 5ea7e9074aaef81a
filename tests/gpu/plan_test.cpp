// SPDX-License-Identifier: Apache-2.0
// The plan on a device: what it computes is what the backend of the same name computes from host
// memory (the tests of the indexers judge that), from inputs and a workspace between red zones.
#include <cuda_runtime_api.h>
#include <gmock/gmock.h>

#include <algorithm>
#include <cstring>
#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "common.hpp"
#include "misa/cuda.hpp"
#include "misa/error.hpp"
#include "support/backend_variable.hpp"

namespace misa::test {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

constexpr int kTopK = 48;

template <class T>
std::span<const std::byte> bytes_of(const T* data, std::int64_t count) {
  return {reinterpret_cast<const std::byte*>(data), static_cast<std::size_t>(count)};
}

// A pack's tensors on the device, and room for what is selected.
class Call {
 public:
  Call(const RaggedInputs& inputs, const IndexerConfig& config)
      : config_(config),
        queries_(inputs.q(inputs.all())),
        weights_(inputs.w(inputs.all())),
        keys_(inputs.k(inputs.all())),
        q_(q_bytes(queries_)),
        w_({weights_.data, static_cast<std::size_t>(queries_.tokens * queries_.heads)}),
        k_(k_bytes(keys_)),
        scale_({keys_.scale, keys_.scale != nullptr ? static_cast<std::size_t>(keys_.tokens) : 0}),
        starts_(keys_.starts),
        ends_(keys_.ends),
        indices_(rows() * static_cast<std::size_t>(config.top_k)),
        scores_(indices_.span().size()),
        heads_(config.router == Router::all ? 0 : rows() * static_cast<std::size_t>(config.heads)),
        residual_(config.residual ? rows() * static_cast<std::size_t>(queries_.dim) : 0) {}

  // Another pack of the same shape.
  void replace(const RaggedInputs& inputs) const {
    const Rows all = inputs.all();
    q_.write(q_bytes(inputs.q(all)));
    w_.write({inputs.w(all).data, w_.span().size()});
    k_.write(k_bytes(inputs.k(all)));
    scale_.write({inputs.k(all).scale, scale_.span().size()});
  }

  void replace_ranges(std::span<const std::int32_t> starts,
                      std::span<const std::int32_t> ends) const {
    starts_.write(starts);
    ends_.write(ends);
  }

  [[nodiscard]] Shape shape() const {
    std::int64_t longest = 0;
    for (std::size_t t = 0; t < keys_.starts.size(); ++t) {
      longest = std::max<std::int64_t>(longest, keys_.ends[t] - keys_.starts[t]);
    }
    return {queries_.tokens, queries_.heads, queries_.dim, longest, queries_.dtype, keys_.dtype};
  }

  [[nodiscard]] cuda::PlanOptions options(const std::string& backend) const {
    cuda::PlanOptions options;
    options.total_keys = keys_.tokens;
    options.backend = backend;
    return options;
  }

  [[nodiscard]] Queries queries() const {
    Queries q = queries_;
    q.data = q_.data();
    return q;
  }

  void enqueue(const cuda::Plan& plan, std::span<std::byte> workspace, cudaStream_t stream) const {
    enqueue(plan, queries(), workspace, stream);
  }

  // With queries that lie elsewhere on the device.
  void enqueue(const cuda::Plan& plan, const Queries& q, std::span<std::byte> workspace,
               cudaStream_t stream) const {
    Weights w = weights_;
    w.data = w_.data();
    RaggedKeys k = keys_;
    k.data = k_.data();
    k.scale = keys_.scale != nullptr ? scale_.data() : nullptr;
    k.starts = starts_.span();
    k.ends = ends_.span();
    plan.run(q, w, k, {indices_.span(), scores_.span(), heads_.span(), residual_.span()}, workspace,
             stream);
  }

  [[nodiscard]] Selected result() const {
    return {queries_.tokens, config_.top_k, indices_.read(),
            scores_.read(),  heads_.read(), residual_.read()};
  }

  // Enqueues on a stream of the device's own and waits.
  [[nodiscard]] Selected run(const cuda::Plan& plan) const { return run(plan, queries()); }
  [[nodiscard]] Selected run(const cuda::Plan& plan, const Queries& q) const {
    const Guarded<std::byte> workspace(plan.workspace_bytes());
    enqueue(plan, q, workspace.span(), nullptr);
    expect_success(cudaDeviceSynchronize());
    workspace.expect_red_zones();
    return result();
  }

 private:
  [[nodiscard]] std::size_t rows() const { return static_cast<std::size_t>(queries_.tokens); }

  static std::span<const std::byte> q_bytes(const Queries& q) {
    return bytes_of(q.data,
                    q.tokens * q.heads * q.dim * static_cast<std::int64_t>(size_of(q.dtype)));
  }
  static std::span<const std::byte> k_bytes(const RaggedKeys& k) {
    return bytes_of(k.data, k.tokens * k.dim * static_cast<std::int64_t>(size_of(k.dtype)));
  }

  IndexerConfig config_;
  Queries queries_;
  Weights weights_;
  RaggedKeys keys_;
  Guarded<std::byte> q_;
  Guarded<float> w_;
  Guarded<std::byte> k_;
  Guarded<float> scale_;
  Guarded<std::int32_t> starts_;
  Guarded<std::int32_t> ends_;
  Guarded<std::int32_t> indices_;
  Guarded<float> scores_;
  Guarded<std::int32_t> heads_;
  Guarded<float> residual_;
};

PackSpec spec_of(DType q_dtype, DType k_dtype, std::uint64_t seed = 1) {
  PackSpec spec;
  spec.sequences = {{0, 2}, {1, 1}, {47, 3}, {300, 40}, {64, 1}, {1100, 70}};
  spec.heads = 6;
  spec.q_dtype = q_dtype;
  spec.k_dtype = k_dtype;
  spec.seed = seed;
  return spec;
}

// Packs that between them reach every kernel. D = 128 in e4m3 is what fused kernels take; its
// blocks of queries stand across sequences.
std::vector<PackSpec> specs(std::uint64_t seed = 1) {
  std::vector<PackSpec> all;
  for (const DType dtype : {DType::e4m3, DType::bf16, DType::f32}) {
    all.push_back(spec_of(dtype, dtype, seed));
  }
  PackSpec fused = spec_of(DType::e4m3, DType::e4m3, seed);
  fused.dim = 128;
  fused.sequences.push_back({6000, 9});
  all.push_back(fused);
  return all;
}

std::vector<NamedConfig> configs() {
  std::vector<NamedConfig> all = named_configs(kTopK, 2);
  IndexerConfig everything = IndexerConfig::misa_r(kTopK, 2, 100);
  everything.filter_block = 128;
  everything.filter_blocks = 3;
  all.push_back({"hisa x misa-r re-ranked", everything});
  everything.heads = 6;  // of 6: it neither routes nor re-ranks
  all.push_back({"hisa x every head", everything});
  IndexerConfig automatic = IndexerConfig::automatic(kTopK);
  automatic.heads = 6;
  automatic.dense_work = 100 * 6;
  all.push_back({"auto, every head", automatic});
  return all;
}

class DevicePlan : public EachCudaBackend {
 protected:
  // What the backend makes of the same call in host memory.
  [[nodiscard]] Selected expected(const IndexerConfig& config, const RaggedInputs& inputs) const {
    return run(context(), config, inputs);
  }

  [[nodiscard]] cuda::Plan plan(const IndexerConfig& config, const Call& call) const {
    return cuda::Plan(config, call.shape(), call.options(GetParam()));
  }
};

TEST_P(DevicePlan, SmokeMatchesTheBackend) {
  for (const PackSpec& spec : specs()) {
    const RaggedInputs inputs(make_pack(spec));
    for (const NamedConfig& named : configs()) {
      const Call call(inputs, named.config);
      EXPECT_TRUE(same_bits(call.run(plan(named.config, call)), expected(named.config, inputs)))
          << named.name << ' ' << name_of(spec.k_dtype) << ", D = " << spec.dim;
    }
  }
}

// Queries may lie head by head, [H, T, D].
TEST_P(DevicePlan, HeadMajorQueries) {
  for (const PackSpec& spec : specs()) {
    const RaggedInputs inputs(make_pack(spec));
    const Queries by_token = inputs.q(inputs.all());
    const std::int64_t row = by_token.dim * static_cast<std::int64_t>(size_of(by_token.dtype));
    std::vector<std::byte> head_major(
        static_cast<std::size_t>(by_token.tokens * by_token.heads * row));
    for (std::int64_t t = 0; t < by_token.tokens; ++t) {
      for (std::int64_t j = 0; j < by_token.heads; ++j) {
        std::memcpy(head_major.data() + (j * by_token.tokens + t) * row,
                    static_cast<const std::byte*>(by_token.data) + (t * by_token.heads + j) * row,
                    static_cast<std::size_t>(row));
      }
    }
    Queries by_head = by_token;
    by_head.data = head_major.data();
    by_head.token_stride = by_token.dim;
    by_head.head_stride = by_token.tokens * by_token.dim;
    const Guarded<std::byte> on_device{std::span<const std::byte>(head_major)};
    for (const NamedConfig& named : configs()) {
      const Selected wanted = expected(named.config, inputs);
      EXPECT_TRUE(same_bits(select(context(), named.config, by_head, inputs.w(inputs.all()),
                                   inputs.k(inputs.all()), {true, true, true}),
                            wanted))
          << named.name << " from host memory";
      const Call call(inputs, named.config);
      Queries q = by_head;
      q.data = on_device.data();
      EXPECT_TRUE(same_bits(call.run(plan(named.config, call), q), wanted)) << named.name;
    }
  }
}

TEST_P(DevicePlan, RepeatsBitForBit) {
  PackSpec spec = spec_of(DType::e4m3, DType::e4m3);
  spec.sequences = {{9000, 300}};
  spec.dim = 128;
  const RaggedInputs inputs(make_pack(spec));
  for (const NamedConfig& named : configs()) {
    const Call call(inputs, named.config);
    const cuda::Plan plan = this->plan(named.config, call);
    const Selected first = call.run(plan);
    for (int i = 0; i < 5; ++i) {
      ASSERT_TRUE(same_bits(call.run(plan), first)) << named.name << ", run " << i;
    }
  }
}

// The keys of a prefill in one array, for kernels of few heads and of many.
TEST_P(DevicePlan, FewerMultiprocessorsChangeNothing) {
  for (const std::int64_t heads : {8, 64}) {
    PackSpec spec = specs().back();
    spec.sequences = {{47, 3}, {9000, 300}};
    spec.heads = heads;
    const RaggedInputs inputs(make_pack(spec));
    std::vector<NamedConfig> all = named_configs(kTopK, 3);
    for (const NamedConfig& named : sketched_configs(kTopK, 3)) {
      all.push_back(named);
    }
    for (const NamedConfig& named : all) {
      const Call call(inputs, named.config);
      const Selected wanted = expected(named.config, inputs);
      for (const int max_sms : {0, 3, 17}) {
        cuda::PlanOptions options = call.options(GetParam());
        options.max_sms = max_sms;
        EXPECT_TRUE(same_bits(call.run(cuda::Plan(named.config, call.shape(), options)), wanted))
            << named.name << ", " << heads << " heads on " << max_sms << " multiprocessors";
      }
    }
  }
}

TEST_P(DevicePlan, SmokeMemoryChangesNothing) {
  for (const PackSpec& spec : specs()) {
    const RaggedInputs inputs(make_pack(spec));
    for (const NamedConfig& named : configs()) {
      const Call call(inputs, named.config);
      cuda::PlanOptions options = call.options(GetParam());
      const auto fits = [&](std::size_t cap) {
        options.workspace_cap = cap;
        try {
          return cuda::Plan(named.config, call.shape(), options).workspace_bytes() <= cap;
        } catch (const Error& error) {
          EXPECT_EQ(error.code(), ErrorCode::workspace) << error.what();
          return false;
        }
      };
      std::size_t cap = 1;
      while (!fits(cap) && cap < (std::size_t{1} << 30)) {
        cap *= 2;
      }
      options.workspace_cap = cap;
      EXPECT_TRUE(same_bits(call.run(cuda::Plan(named.config, call.shape(), options)),
                            expected(named.config, inputs)))
          << named.name << ' ' << name_of(spec.k_dtype) << ", D = " << spec.dim << ", in " << cap
          << " bytes";
    }
  }
}

TEST_P(DevicePlan, SmokeAGraphReplaysWithOtherData) {
  const RaggedInputs first(make_pack(specs(1).back()));
  const RaggedInputs second(make_pack(specs(2).back()));
  for (const NamedConfig& named : configs()) {
    const Call call(first, named.config);
    const cuda::Plan plan = this->plan(named.config, call);
    const Guarded<std::byte> workspace(plan.workspace_bytes());
    cudaStream_t stream = nullptr;
    expect_success(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    expect_success(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    call.enqueue(plan, workspace.span(), stream);
    cudaGraph_t graph = nullptr;
    expect_success(cudaStreamEndCapture(stream, &graph));
    cudaGraphExec_t executable = nullptr;
    expect_success(cudaGraphInstantiate(&executable, graph, 0));
    for (const RaggedInputs* inputs : {&first, &second, &first}) {
      call.replace(*inputs);
      expect_success(cudaDeviceSynchronize());
      expect_success(cudaGraphLaunch(executable, stream));
      expect_success(cudaStreamSynchronize(stream));
      EXPECT_TRUE(same_bits(call.result(), expected(named.config, *inputs))) << named.name;
    }
    expect_success(cudaGraphExecDestroy(executable));
    expect_success(cudaGraphDestroy(graph));
    expect_success(cudaStreamDestroy(stream));
  }
}

// Ranges that no host ever saw: whatever they hold is clamped, never followed.
TEST_P(DevicePlan, SmokeRangesAreClamped) {
  constexpr std::int32_t kLeast = std::numeric_limits<std::int32_t>::min();
  constexpr std::int32_t kMost = std::numeric_limits<std::int32_t>::max();
  PackSpec spec = specs().back();
  spec.sequences = {{700, 12}};
  const RaggedInputs inputs(make_pack(spec));
  const std::vector<std::int32_t> starts{0,      kLeast, kMost, 700, 701,   -1,
                                         kLeast, 350,    600,   0,   kMost, 699};
  const std::vector<std::int32_t> ends{kMost, kMost, kLeast, 900,    kMost, 700,
                                       -5,    349,   kMost,  kLeast, kMost, 700};
  for (const NamedConfig& named : configs()) {
    const Call call(inputs, named.config);
    call.replace_ranges(starts, ends);
    RaggedKeys clamped = inputs.k(inputs.all());
    std::vector<std::int32_t> clamped_starts;
    std::vector<std::int32_t> clamped_ends;
    for (std::size_t t = 0; t < starts.size(); ++t) {
      clamped_starts.push_back(std::clamp(starts[t], 0, 700));
      clamped_ends.push_back(std::clamp(ends[t], clamped_starts.back(), 700));
    }
    clamped.starts = clamped_starts;
    clamped.ends = clamped_ends;
    const Selected wanted = select(context(), named.config, inputs.q(inputs.all()),
                                   inputs.w(inputs.all()), clamped, {true, true, true});
    EXPECT_TRUE(same_bits(call.run(plan(named.config, call)), wanted)) << named.name;
  }
}

// A plan serves calls of fewer keys than it was made for, down to none.
TEST_P(DevicePlan, SmokeFewerKeysThanPlanned) {
  for (const std::int64_t keys : {0, 1, 300, 5999}) {
    PackSpec spec = specs().back();
    spec.sequences = {{keys, 7}};
    const RaggedInputs inputs(make_pack(spec));
    for (const NamedConfig& named : configs()) {
      const Call call(inputs, named.config);
      Shape shape = call.shape();
      shape.tokens = 70;
      shape.max_keys = 6000;
      cuda::PlanOptions options = call.options(GetParam());
      options.total_keys = 20000;
      EXPECT_TRUE(same_bits(call.run(cuda::Plan(named.config, shape, options)),
                            expected(named.config, inputs)))
          << named.name << ", " << keys << " keys";
    }
  }
}

// A row that sees more than was planned is cut, so that no buffer overflows.
TEST_P(DevicePlan, SmokeRowsAreCutAtThePlannedLength) {
  PackSpec spec = specs().back();
  spec.sequences = {{700, 5}};
  const RaggedInputs inputs(make_pack(spec));
  for (const NamedConfig& named : configs()) {
    const Call call(inputs, named.config);
    Shape shape = call.shape();
    shape.max_keys = 500;
    RaggedKeys cut = inputs.k(inputs.all());
    const std::vector<std::int32_t> ends(5, 500);
    cut.ends = ends;
    const Selected wanted = select(context(), named.config, inputs.q(inputs.all()),
                                   inputs.w(inputs.all()), cut, {true, true, true});
    EXPECT_TRUE(
        same_bits(call.run(cuda::Plan(named.config, shape, call.options(GetParam()))), wanted))
        << named.name;
  }
}

// A name means for arrays on the device what it means for arrays in host memory, and the variable
// is heeded or refused.
TEST_P(DevicePlan, NamesOfBackends) {
  const IndexerConfig config = IndexerConfig::dsa(kTopK);
  const RaggedInputs inputs(make_pack(spec_of(DType::bf16, DType::bf16)));
  const Call call(inputs, config);
  const auto backend_of = [&](const std::string& name) -> std::string {
    try {
      return std::string(cuda::Plan(config, call.shape(), call.options(name)).backend());
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::unsupported);
      return error.what();
    }
  };
  EXPECT_EQ(backend_of("cuda"), Context({.backend = "cuda"}).backend());
  EXPECT_EQ(backend_of(GetParam()), GetParam());
  EXPECT_THAT(backend_of("cpu"), StartsWith("backend: expected auto, cuda, "));
  EXPECT_THAT(backend_of("cpu"), HasSubstr("device memory, got 'cpu'"));

  const BackendVariable variable(GetParam().c_str());
  EXPECT_EQ(backend_of("auto"), GetParam());
  for (const char* name : {"cpu", "reference", "abacus"}) {
    const BackendVariable wrong(name);
    EXPECT_THAT(backend_of("auto"), StartsWith("MISA_BACKEND: expected auto, cuda, "));
    EXPECT_THAT(backend_of("auto"), HasSubstr(name));
    EXPECT_EQ(backend_of(GetParam()), GetParam());
  }
}

TEST_P(DevicePlan, RefusesBadArguments) {
  const IndexerConfig config = IndexerConfig::dsa(kTopK);
  PackSpec spec = spec_of(DType::bf16, DType::bf16);
  const RaggedInputs inputs(make_pack(spec));
  const RaggedInputs padded(make_pack(spec), 1);
  const Call call(inputs, config);
  const Shape shape = call.shape();
  const auto message = [](const std::function<void()>& act) -> std::string {
    try {
      act();
    } catch (const Error& error) {
      return error.what();
    }
    return "no error";
  };
  const auto plan_with = [&](auto change) {
    return message([&] {
      cuda::PlanOptions options = call.options(GetParam());
      IndexerConfig changed = config;
      change(options, changed);
      const cuda::Plan plan(changed, shape, options);
    });
  };
  EXPECT_THAT(plan_with([](auto& options, auto&) { options.backend = "cpu"; }),
              HasSubstr("backend: "));
  EXPECT_THAT(plan_with([](auto& options, auto&) { options.total_keys = -1; }),
              HasSubstr("total_keys: "));
  EXPECT_THAT(plan_with([](auto& options, auto&) { options.workspace_cap = 1; }),
              HasSubstr("workspace cap: "));
  EXPECT_THAT(plan_with([](auto&, auto& changed) { changed.top_k = cuda::kMaxTopK + 1; }),
              HasSubstr("top_k, candidates: "));
  EXPECT_THAT(plan_with([](auto&, auto& changed) { changed.top_k = 0; }), HasSubstr("top_k: "));

  const cuda::Plan plan = this->plan(config, call);
  const Guarded<std::byte> workspace(plan.workspace_bytes());
  const auto run_with = [&](std::span<std::byte> memory) {
    return message([&] { call.enqueue(plan, memory, nullptr); });
  };
  EXPECT_THAT(run_with(workspace.span().subspan(1)), HasSubstr("workspace: "));
  EXPECT_THAT(run_with(workspace.span().first(workspace.span().size() - 1)),
              HasSubstr("workspace: "));
  cuda::PlanOptions few = call.options(GetParam());
  few.total_keys -= 1;
  const cuda::Plan small(config, shape, few);
  EXPECT_THAT(message([&] { call.enqueue(small, workspace.span(), nullptr); }),
              HasSubstr("k: expected L"));
  // Host pointers serve: arguments are refused before anything is read.
  const Rows all = padded.all();
  few.total_keys = padded.k(all).tokens;
  const cuda::Plan large(config, shape, few);
  EXPECT_THAT(message([&] {
                large.run(padded.q(all), padded.w(all), padded.k(all), {}, workspace.span(),
                          nullptr);
              }),
              HasSubstr("bytes apart"));
}

INSTANTIATE_TEST_SUITE_P(Each, DevicePlan, ::testing::ValuesIn(cuda_backends_of_this_build()),
                         backend_name);

}  // namespace
}  // namespace misa::test
