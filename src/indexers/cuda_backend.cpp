// SPDX-License-Identifier: Apache-2.0
// Makes CUDA devices backends for calls in host memory: the inputs are copied to the device, paged
// keys as ragged keys, and the results are copied back.
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <cstring>
#include <limits>
#include <vector>

#include "cuda/check.cuh"
#include "cuda/target.hpp"
#include "indexers/backend.hpp"
#include "indexers/cuda.hpp"
#include "indexers/cuda_means.hpp"
#include "misa/cache.hpp"
#include "misa/error.hpp"

namespace misa::cuda {
namespace {

class Stream {
 public:
  Stream() {
    check(cudaStreamCreateWithFlags(&stream_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags");
  }
  ~Stream() { cudaStreamDestroy(stream_); }
  Stream(const Stream&) = delete;
  Stream& operator=(const Stream&) = delete;

  [[nodiscard]] cudaStream_t get() const { return stream_; }

 private:
  cudaStream_t stream_ = nullptr;
};

class DeviceMemory {
 public:
  DeviceMemory(std::size_t bytes, const Stream& stream) : stream_(stream) {
    check(cudaMallocAsync(&data_, bytes, stream.get()), "cudaMallocAsync");
  }
  ~DeviceMemory() { cudaFreeAsync(data_, stream_.get()); }
  DeviceMemory(const DeviceMemory&) = delete;
  DeviceMemory& operator=(const DeviceMemory&) = delete;

  [[nodiscard]] std::byte* at(std::size_t offset) const {
    return static_cast<std::byte*>(data_) + offset;
  }

 private:
  const Stream& stream_;
  void* data_ = nullptr;
};

// Arrays of one allocation, each aligned as an allocation of its own would be.
class DeviceLayout {
 public:
  std::size_t add(std::size_t bytes) {
    const std::size_t at = bytes_;
    bytes_ += (bytes + kDeviceAlignment - 1) / kDeviceAlignment * kDeviceAlignment;
    return at;
  }
  [[nodiscard]] std::size_t bytes() const { return bytes_; }

 private:
  std::size_t bytes_ = 0;
};

// The keys of a paged call, sequence after sequence.
struct RaggedCopy {
  std::vector<std::uint8_t> k;
  std::vector<float> scale;
  std::vector<std::int32_t> starts;
  std::vector<std::int32_t> ends;

  RaggedCopy(const misa::Problem& problem, const PagedSource& paged) {
    std::int64_t tokens = 0;
    for_each_sequence(problem,
                      [&](const Sequence& /*queries*/, std::int64_t length) { tokens += length; });
    constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
    if (tokens > kMost) {
      throw Error(
          ErrorCode::unsupported,
          fmt::format("context_lens: expected at most {} keys in all on a CUDA backend, got {}",
                      kMost, tokens));
    }
    const std::int64_t dim = paged.cache.dim;
    k.resize(static_cast<std::size_t>(tokens * dim));
    scale.resize(static_cast<std::size_t>(tokens));
    std::int64_t first = 0;
    for_each_sequence(problem, [&](const Sequence& queries, std::int64_t length) {
      gather(paged.cache,
             {paged.table_of(queries.first), static_cast<std::size_t>(paged.max_pages)}, length,
             std::span(k).subspan(first * dim, length * dim),
             std::span(scale).subspan(first, length));
      for (std::int64_t i = 0; i < queries.queries; ++i) {
        starts.push_back(static_cast<std::int32_t>(first));
        ends.push_back(static_cast<std::int32_t>(first + problem.visible(queries.first + i)));
      }
      first += length;
    });
  }

  [[nodiscard]] RaggedKeys view(std::int64_t dim) const {
    return {k.data(), DType::e4m3, std::ssize(scale), dim, dim, scale.data(), starts, ends};
  }

 private:
  // Calls body(its queries, how many of its keys they see at most) for every sequence with queries.
  template <class Body>
  static void for_each_sequence(const misa::Problem& problem, const Body& body) {
    for (std::int64_t t = 0; t < problem.q.tokens;) {
      const Sequence queries = problem.sequence_at(t, problem.q.tokens);
      std::int64_t length = 0;
      for (std::int64_t i = 0; i < queries.queries; ++i) {
        length = std::max(length, problem.visible(t + i));
      }
      body(queries, length);
      t += queries.queries;
    }
  }
};

// The inputs of a call without padding, in the layout that they will have on the device.
class Inputs {
 public:
  Inputs(const misa::Problem& problem, const RaggedKeys& k) : q_(problem.q), w_(problem.w), k_(k) {
    const auto element = static_cast<std::int64_t>(size_of(q_.dtype));
    q_at_ = add(q_.tokens * q_.heads * q_.dim * element);
    w_at_ = add(q_.tokens * q_.heads * std::int64_t{sizeof(float)});
    const KeyFormat format = format_of(k.dtype);
    k_at_ = add(k.tokens * format.element_bytes(k.dim));
    scale_at_ = add(k.tokens * format.scale_bytes());
    starts_at_ = add(static_cast<std::int64_t>(k.starts.size_bytes()));
    ends_at_ = add(static_cast<std::int64_t>(k.ends.size_bytes()));
    bytes_.resize(layout_.bytes());
    const std::int64_t q_row = q_.heads * q_.dim;
    for (std::int64_t t = 0; t < q_.tokens; ++t) {
      copy_rows(q_at_ + static_cast<std::size_t>(t * q_row * element), problem.query(t, 0),
                q_.heads, q_.head_stride * element, q_.dim * element);
    }
    copy_rows(w_at_, w_.data, q_.tokens, w_.token_stride * std::int64_t{sizeof(float)},
              q_.heads * std::int64_t{sizeof(float)});
    copy_rows(k_at_, k.data, k.tokens, format.element_bytes(k.token_stride),
              format.element_bytes(k.dim));
    copy_rows(scale_at_, k.scale, k.tokens, format.scale_bytes(), format.scale_bytes());
    copy_rows(starts_at_, k.starts.data(), 1, 0, static_cast<std::int64_t>(k.starts.size_bytes()));
    copy_rows(ends_at_, k.ends.data(), 1, 0, static_cast<std::int64_t>(k.ends.size_bytes()));
  }

  [[nodiscard]] const std::vector<std::byte>& bytes() const { return bytes_; }

  // The call, once the bytes lie at the start of `memory`.
  [[nodiscard]] Problem on_device(const DeviceMemory& memory, std::int64_t max_keys) const {
    Queries q = q_;
    q.data = memory.at(q_at_);
    q.head_stride = q.dim;
    q.token_stride = q.heads * q.dim;
    Weights w = w_;
    w.data = reinterpret_cast<const float*>(memory.at(w_at_));
    w.token_stride = w.heads;
    const auto* scale = reinterpret_cast<const float*>(memory.at(scale_at_));
    return {q,
            w,
            {memory.at(k_at_), k_.dtype, k_.tokens, k_.dim, k_.scale != nullptr ? scale : nullptr,
             reinterpret_cast<const std::int32_t*>(memory.at(starts_at_)),
             reinterpret_cast<const std::int32_t*>(memory.at(ends_at_)),
             static_cast<std::int32_t>(max_keys)}};
  }

 private:
  std::size_t add(std::int64_t bytes) { return layout_.add(static_cast<std::size_t>(bytes)); }

  void copy_rows(std::size_t to, const void* from, std::int64_t rows, std::int64_t stride,
                 std::int64_t bytes) {
    for (std::int64_t i = 0; bytes > 0 && i < rows; ++i) {
      std::memcpy(bytes_.data() + to + i * bytes, static_cast<const std::byte*>(from) + i * stride,
                  static_cast<std::size_t>(bytes));
    }
  }

  Queries q_;
  Weights w_;
  RaggedKeys k_;
  DeviceLayout layout_;
  std::vector<std::byte> bytes_;
  std::size_t q_at_;
  std::size_t w_at_;
  std::size_t k_at_;
  std::size_t scale_at_;
  std::size_t starts_at_;
  std::size_t ends_at_;
};

// The device's copy of an output in host memory, which is dense there.
template <class T>
class Output {
 public:
  // Rows of `width` elements in host memory, `stride` elements apart.
  Output(std::span<T> host, std::int64_t rows, std::int64_t width, std::int64_t stride,
         DeviceLayout& layout)
      : host_(host),
        rows_(host.empty() ? 0 : static_cast<std::size_t>(rows)),
        row_bytes_(static_cast<std::size_t>(width) * sizeof(T)),
        pitch_(static_cast<std::size_t>(stride) * sizeof(T)),
        at_(layout.add(rows_ * row_bytes_)) {}
  Output(std::span<T> host, DeviceLayout& layout)
      : Output(host, 1, std::ssize(host), std::ssize(host), layout) {}

  [[nodiscard]] std::span<T> on_device(const DeviceMemory& memory) const {
    return {host_.empty() ? nullptr : reinterpret_cast<T*>(memory.at(at_)),
            rows_ * row_bytes_ / sizeof(T)};
  }

  void fetch(const DeviceMemory& memory, const Stream& stream) const {
    if (!host_.empty()) {
      check(cudaMemcpy2DAsync(host_.data(), pitch_, memory.at(at_), row_bytes_, row_bytes_, rows_,
                              cudaMemcpyDeviceToHost, stream.get()),
            "cudaMemcpy2DAsync");
    }
  }

 private:
  std::span<T> host_;
  std::size_t rows_;
  std::size_t row_bytes_;
  std::size_t pitch_;
  std::size_t at_;
};

// A call on block means: run(call, out), with everything on the device.
template <class Run>
void run_on_means(const MeansProblem& problem, const DeviceTraits& device, const Run& run) {
  if (problem.out.empty()) {
    return;
  }
  const auto& means = std::get<misa::RaggedSource>(problem.problem.keys);
  const Inputs inputs(problem.problem, means);
  DeviceLayout layout;
  layout.add(inputs.bytes().size());
  const std::size_t partial = layout.add(problem.partial.size_bytes());
  const Output out(problem.out, layout);
  const std::size_t workspace =
      layout.add(means_bytes(problem.problem.q.tokens, means.dim, means.tokens));

  const Stream stream;
  const DeviceMemory memory(layout.bytes(), stream);
  const auto copy = [&](std::size_t to, const void* from, std::size_t bytes) {
    check(cudaMemcpyAsync(memory.at(to), from, bytes, cudaMemcpyHostToDevice, stream.get()),
          "cudaMemcpyAsync");
  };
  copy(0, inputs.bytes().data(), inputs.bytes().size());
  copy(partial, problem.partial.data(), problem.partial.size_bytes());
  const auto [q, w, k] = inputs.on_device(memory, 0);
  const auto rows = static_cast<std::size_t>(q.tokens);
  const auto* partial_rows = reinterpret_cast<const std::int32_t*>(memory.at(partial));
  run({q,
       w,
       {static_cast<const float*>(k.data),
        k.tokens,
        q.dim,
        k.stride,
        {k.starts, rows},
        {k.ends, rows},
        {problem.partial.empty() ? nullptr : partial_rows, problem.partial.size()}},
       device,
       memory.at(workspace),
       stream.get()},
      out.on_device(memory).data());
  out.fetch(memory, stream);
  check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
}

class CudaPlan final : public BackendPlan {
 public:
  CudaPlan(const IndexerConfig& config, const Shape& shape, std::size_t cap,
           const DeviceTraits& device)
      : config_(config), shape_(shape), cap_(cap), device_(device) {
    const Step checked(config, shape, ragged_bounds(shape.max_keys), cap, device);
  }

  // No host memory: the workspace is on the device, and each run allocates and frees it.
  [[nodiscard]] std::size_t workspace_bytes() const override { return 0; }

  void run(const misa::Problem& problem, std::span<std::byte> /*workspace*/) const override {
    if (problem.q.tokens == 0) {
      return;
    }
    if (const auto* paged = std::get_if<PagedSource>(&problem.keys)) {
      const RaggedCopy copy(problem, *paged);
      run_ragged(problem, copy.view(problem.q.dim));
    } else {
      run_ragged(problem, std::get<misa::RaggedSource>(problem.keys));
    }
  }

 private:
  void run_ragged(const misa::Problem& problem, const RaggedKeys& k) const {
    const Inputs inputs(problem, k);
    Shape shape = shape_;
    shape.tokens = problem.q.tokens;
    // The total number of keys is known only now. If the cap, which was enough for the longest
    // query alone, cannot hold one query with that many keys, it is exceeded.
    const KeyBounds keys = ragged_bounds(k.tokens);
    const std::size_t cap = std::max(cap_, Step::least_bytes(config_, shape, keys, device_));
    const Step step(config_, shape, keys, cap, device_);

    DeviceLayout layout;
    layout.add(inputs.bytes().size());
    const std::int64_t rows = problem.q.tokens;
    const std::int64_t top_k = config_.top_k;
    const Output indices(problem.out.indices, rows, top_k, problem.out.index_stride, layout);
    const Output scores(problem.out.scores, rows, top_k, problem.out.score_stride, layout);
    const Output heads(problem.out.heads, layout);
    const Output residual(problem.out.residual, layout);
    const std::size_t workspace = layout.add(step.workspace_bytes());

    const Stream stream;
    const DeviceMemory memory(layout.bytes(), stream);
    check(cudaMemcpyAsync(memory.at(0), inputs.bytes().data(), inputs.bytes().size(),
                          cudaMemcpyHostToDevice, stream.get()),
          "cudaMemcpyAsync");
    step.run(inputs.on_device(memory, shape_.max_keys),
             {indices.on_device(memory), scores.on_device(memory), heads.on_device(memory),
              residual.on_device(memory), top_k, top_k},
             memory.at(workspace), stream.get());
    indices.fetch(memory, stream);
    scores.fetch(memory, stream);
    heads.fetch(memory, stream);
    residual.fetch(memory, stream);
    check(cudaStreamSynchronize(stream.get()), "cudaStreamSynchronize");
  }

  IndexerConfig config_;
  Shape shape_;
  std::size_t cap_;
  DeviceTraits device_;
};

class CudaBackend final : public Backend {
 public:
  explicit CudaBackend(const Target& target) : target_(target) {}

  [[nodiscard]] BackendInfo info() const override {
    return {std::string(target_.name), std::string(target_.isa), target_.requirement,
            available(target_), target_.priority};
  }

  [[nodiscard]] std::unique_ptr<const BackendPlan> plan(
      const IndexerConfig& config, const Shape& shape,
      const Context::State& context) const override {
    return std::make_unique<CudaPlan>(config, shape, context.workspace_cap, traits_of(target_));
  }

  void route(const MeansProblem& problem, const Context::State& /*context*/) const override {
    run_on_means(problem, traits_of(target_), [&](const MeansCall& call, std::int32_t* out) {
      route_from_means(call, static_cast<int>(problem.width), out);
    });
  }

  void keep_blocks(const MeansProblem& problem, const Context::State& /*context*/) const override {
    run_on_means(problem, traits_of(target_), [&](const MeansCall& call, std::int32_t* out) {
      keep_blocks_from_means(call, static_cast<int>(problem.width), out);
    });
  }

 private:
  const Target& target_;
};

}  // namespace
}  // namespace misa::cuda

namespace misa {

std::span<const Backend* const> cuda_backends() {
  static const std::vector<cuda::CudaBackend> objects(cuda::targets().begin(),
                                                      cuda::targets().end());
  static const std::vector<const Backend*> pointers = [] {
    std::vector<const Backend*> list;
    for (const cuda::CudaBackend& object : objects) {
      list.push_back(&object);
    }
    return list;
  }();
  return pointers;
}

}  // namespace misa
