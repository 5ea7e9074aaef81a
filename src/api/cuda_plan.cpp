// SPDX-License-Identifier: Apache-2.0
// The public plan for arrays in device memory, and the calls on block means there. Only what does
// not need a read of device memory is checked.
#include <algorithm>
#include <initializer_list>
#include <limits>

#include "api/backends.hpp"
#include "api/validate.hpp"
#include "core/require.hpp"
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

void validate_plan(const IndexerConfig& config, const Shape& shape, const PlanOptions& options) {
  validate(config, shape);
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  require(options.total_keys >= 0 && options.total_keys <= kMost,
          "total_keys: expected 0 to {}, got {}", kMost, options.total_keys);
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
        target(target_for(options.backend)),
        step(chosen, bounds, options.total_keys, options.workspace_cap, traits_of(target)) {}

  IndexerConfig config;
  Shape shape;
  std::int64_t total_keys;
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
  const Shape& planned = state_->shape;
  validate_planned({q.tokens, q.heads, q.dim, planned.max_keys, q.dtype, k.dtype}, planned);
  require(k.tokens <= state_->total_keys, "k: expected L = {} at most, as planned, got {}",
          state_->total_keys, k.tokens);
  require_rows("q", q.data, q.dtype, {q.token_stride, q.head_stride});
  require_rows("k", k.data, k.dtype, {k.token_stride});
  validate(out, state_->config, q);
  validate_device_workspace(workspace, workspace_bytes());
  state_->step.run({q,
                    w,
                    {k.data, k.dtype, k.tokens, k.token_stride, k.scale, k.starts.data(),
                     k.ends.data(), static_cast<std::int32_t>(planned.max_keys)}},
                   out, workspace.data(), stream);
}

}  // namespace misa::cuda
