// SPDX-License-Identifier: Apache-2.0
// The public plan for arrays in device memory, and the calls on block means there. Only what does
// not need a read of device memory is checked.
#include <algorithm>
#include <bit>
#include <initializer_list>
#include <limits>

#include "api/backends.hpp"
#include "api/validate.hpp"
#include "cache/cache.hpp"
#include "core/require.hpp"
#include "cuda/modules.hpp"
#include "cuda/problem.hpp"
#include "cuda/target.hpp"
#include "indexers/cuda.hpp"
#include "indexers/cuda_means.hpp"
#include "misa/cuda.hpp"

namespace misa::cuda {
namespace {

// Keys and queries are read 16 bytes at a time.
constexpr std::int64_t kRowAlignment = 16;

const Target& target_for(std::string_view backend) {
  const std::string name = choose_backend(cuda_backends(), "device memory", backend).info().name;
  return *std::ranges::find(targets(), name, &Target::name);
}

void require_rows(std::string_view name, const void* data, DType dtype,
                  std::initializer_list<std::int64_t> strides) {
  require(reinterpret_cast<std::uintptr_t>(data) % kRowAlignment == 0,
          "{}: expected data aligned to {} bytes, got {}", name, kRowAlignment, data);
  for (const std::int64_t stride : strides) {
    require(stride * static_cast<std::int64_t>(size_of(dtype)) % kRowAlignment == 0,
            "{}: expected rows a multiple of {} bytes apart, got {} elements of {}", name,
            kRowAlignment, stride, name_of(dtype));
  }
}

constexpr std::int64_t kMostKeys = std::numeric_limits<std::int32_t>::max();

void validate_plan(const IndexerConfig& config, const Shape& shape, const PlanOptions& options) {
  validate(config, shape);
  require(options.total_keys >= 0 && options.total_keys <= kMostKeys,
          "total_keys: expected 0 to {}, got {}", kMostKeys, options.total_keys);
  const std::int64_t most = kMostKeys >> sequence_bits(shape.max_keys);
  require(options.batch >= 0 && options.batch <= most,
          "batch: expected 0 (ragged keys) to {} with max_keys = {}, got {}", most, shape.max_keys,
          options.batch);
  require(options.max_sms >= 0, "max_sms: expected 0 (all) or more, got {}", options.max_sms);
  require(options.batch == 0 || shape.k_dtype == DType::e4m3,
          "k_dtype: expected e4m3 with paged keys, got {}", name_of(shape.k_dtype));
}

// The traits of the current device with at most max_sms multiprocessors; 0: with all.
DeviceTraits limited_traits(const Target& target, int max_sms) {
  DeviceTraits traits = traits_of(target);
  traits.num_sms = max_sms == 0 ? traits.num_sms : std::min(traits.num_sms, max_sms);
  return traits;
}

// Checks what a device needs of paged keys, whose layout is valid.
void validate_device(const PagedKeys& k, std::int64_t batch, const Queries& q) {
  const std::int64_t stride = k.cache.page_stride;
  require(reinterpret_cast<std::uintptr_t>(k.cache.data) % kRowAlignment == 0,
          "cache: expected data aligned to {} bytes, got {}", kRowAlignment,
          static_cast<const void*>(k.cache.data));
  require(stride % kRowAlignment == 0,
          "cache: expected a page stride that is a multiple of {} bytes, got {}", kRowAlignment,
          stride);
  if (k.cache.page_sums != nullptr) {
    require_rows("page_sums", k.cache.page_sums, DType::f32, {k.cache.page_sums_stride});
  }
  constexpr std::int64_t kMostCached = std::numeric_limits<std::uint32_t>::max();
  const std::int64_t cached = checked_multiply_add("cache", k.cache.pages, k.cache.page_size);
  require(cached <= kMostCached, "cache: expected at most {} keys, got {}", kMostCached, cached);
  require(k.max_pages <= kMostKeys, "block_table: expected max_pages = 0 to {}, got {}", kMostKeys,
          k.max_pages);
  require(q.tokens <= kMostKeys, "q: expected T = 0 to {}, got {}", kMostKeys, q.tokens);
  require(batch > 0 || q.tokens == 0,
          "query_starts: expected a sequence for T = {} queries, got none", q.tokens);
}

void validate_device_workspace(std::span<std::byte> workspace, std::size_t bytes) {
  validate_workspace(workspace, bytes);
  require_data("workspace", workspace.data(), 0, kDeviceAlignment);
}

// A validated call on block means, without its output.
MeansCall means_call(const Queries& queries, const Weights& weights, const RaggedMeans& means,
                     std::span<std::byte> workspace, void* stream, std::string_view backend) {
  const Queries q = validated(queries);
  const Weights w = validated(weights, q);
  const RaggedMeans resolved = validated_layout(means, q);
  require_rows("q", q.data, q.dtype, {q.token_stride, q.head_stride});
  validate_device_workspace(workspace, means_bytes(q.tokens, q.dim, resolved.count));
  return {q, w, resolved, traits_of(target_for(backend)), workspace.data(), stream};
}

}  // namespace

std::size_t means_workspace_bytes(std::int64_t tokens, std::int64_t dim, std::int64_t count) {
  validate_means_sizes(tokens, dim, count);
  return means_bytes(tokens, dim, count);
}

void route_from_means(const Queries& q, const Weights& w, const RaggedMeans& means, int heads,
                      std::span<std::int32_t> out, std::span<std::byte> workspace, void* stream,
                      std::string_view backend) {
  const MeansCall call = means_call(q, w, means, workspace, stream, backend);
  validate_routed_heads(heads, out, call.q);
  route_from_means(call, heads, out.data());
}

void keep_blocks_from_means(const Queries& q, const Weights& w, const RaggedMeans& means,
                            int filter_blocks, std::span<std::int32_t> out,
                            std::span<std::byte> workspace, void* stream,
                            std::string_view backend) {
  const MeansCall call = means_call(q, w, means, workspace, stream, backend);
  validate_kept_blocks(filter_blocks, out, call.q);
  keep_blocks_from_means(call, filter_blocks, out.data());
}

struct Plan::State {
  State(const IndexerConfig& chosen, const Shape& bounds, const PlanOptions& options)
      : config(chosen),
        shape(bounds),
        total_keys(options.total_keys),
        batch(options.batch),
        target(target_for(options.backend)),
        step(chosen, bounds,
             batch == 0 ? ragged_bounds(total_keys)
                        : paged_bounds(batch, bounds.max_keys, options.workspace_cap),
             options.workspace_cap, limited_traits(target, options.max_sms)) {
    load_kernels();
  }

  // Checks a call, except its keys, and returns its outputs with their actual strides.
  [[nodiscard]] Selection validated_call(const Queries& q, DType k_dtype, const Selection& out,
                                         const CacheView* cache,
                                         std::span<std::byte> workspace) const {
    validate_planned({q.tokens, q.heads, q.dim, shape.max_keys, q.dtype, k_dtype}, shape);
    require_rows("q", q.data, q.dtype, {q.token_stride, q.head_stride});
    validate_device_workspace(workspace, step.workspace_bytes());
    return validated(out, config, q, cache);
  }

  IndexerConfig config;
  Shape shape;
  std::int64_t total_keys;
  std::int64_t batch;  // 0: of ragged keys
  const Target& target;
  Step step;
};

Plan::Plan(const IndexerConfig& config, const Shape& shape, const PlanOptions& options) {
  validate_plan(config, shape, options);
  state_ = std::make_unique<State>(config, shape, options);
}
Plan::~Plan() = default;
Plan::Plan(Plan&&) noexcept = default;
Plan& Plan::operator=(Plan&&) noexcept = default;

std::size_t Plan::workspace_bytes() const { return state_->step.workspace_bytes(); }
std::string_view Plan::backend() const { return state_->target.name; }

void Plan::run(const Queries& queries, const Weights& weights, const RaggedKeys& keys,
               const Selection& out, std::span<std::byte> workspace, void* stream) const {
  const Queries q = validated(queries);
  const Weights w = validated(weights, q);
  const RaggedKeys k = validated_layout(keys, q);
  require(state_->batch == 0, "k: expected paged keys, as planned, got ragged ones");
  require(k.tokens <= state_->total_keys, "k: expected L = {} at most, as planned, got {}",
          state_->total_keys, k.tokens);
  require_rows("k", k.data, k.dtype, {k.token_stride});
  const Selection selection = state_->validated_call(q, k.dtype, out, cache_of(k), workspace);
  state_->step.run(Problem{q,
                           w,
                           {k.data, k.dtype, k.tokens, k.token_stride, k.scale, k.starts.data(),
                            k.ends.data(), static_cast<std::int32_t>(state_->shape.max_keys)}},
                   selection, workspace.data(), stream);
}

void Plan::run(const Queries& queries, const Weights& weights, const PagedKeys& keys,
               const Selection& out, std::span<std::byte> workspace, void* stream) const {
  const Queries q = validated(queries);
  const Weights w = validated(weights, q);
  const PagedKeys k = validated_layout(keys, q);
  const std::int64_t batch = batch_of(k, q);
  require(state_->batch > 0, "k: expected ragged keys, as planned, got paged ones");
  require(batch <= state_->batch,
          "context_lens: expected a batch of {} at most, as planned, got {}", state_->batch, batch);
  validate_device(k, batch, q);
  const Selection selection = state_->validated_call(q, DType::e4m3, out, cache_of(k), workspace);
  DevicePagedSource source{};
  source.data = k.cache.data;
  source.pages = k.cache.pages;
  source.page_stride = k.cache.page_stride;
  source.dim = static_cast<std::int32_t>(q.dim);
  source.page_bits = std::countr_zero(static_cast<std::uint64_t>(k.cache.page_size));
  source.page_sums = k.cache.page_sums;
  source.page_sums_stride = k.cache.page_sums_stride;
  source.largest_scales = k.cache.largest_scales;
  source.largest_scales_stride = k.cache.largest_scales_stride;
  source.block_table = k.block_table;
  source.table_stride = k.block_table_stride;
  source.max_pages = static_cast<std::int32_t>(k.max_pages);
  source.sequences = static_cast<std::int32_t>(batch);
  source.sequence_bits = sequence_bits(state_->shape.max_keys);
  source.context_lens = k.context_lens.data();
  source.row_lens = k.row_lens.empty() ? nullptr : k.row_lens.data();
  source.query_starts = k.query_starts.empty() ? nullptr : k.query_starts.data();
  source.next_n = static_cast<std::int32_t>(k.next_n);
  source.max_keys = static_cast<std::int32_t>(state_->shape.max_keys);
  if (k.cache.sketch != nullptr && k.cache.sketch_bits == state_->config.sketch) {
    require_device_sketch(k.cache);
    source.sketch = k.cache.sketch;
    source.sketch_stride = k.cache.sketch_stride;
  }
  state_->step.run(PagedProblem{q, w, source}, selection, workspace.data(), stream);
}

}  // namespace misa::cuda
