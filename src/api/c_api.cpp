// SPDX-License-Identifier: Apache-2.0
// The C interface over the C++ one: structs are translated field by field, exceptions become
// statuses.
#include <algorithm>
#include <exception>
#include <new>
#include <string_view>
#include <vector>

#include "core/require.hpp"
#include "misa/cuda.hpp"
#include "misa/misa.h"
#include "misa/misa.hpp"

struct misa_context {
  misa::Context context;
};

struct misa_plan {
  misa::Plan plan;
};

struct misa_cuda_plan {
  misa::cuda::Plan plan;
};

namespace {

// Of fixed size, because reporting that memory ran out must not allocate.
constexpr std::size_t kMessageBytes = 512;
thread_local char last_error[kMessageBytes] = "";

misa_status fail(misa_status status, std::string_view message) noexcept {
  const std::size_t length = std::min(message.size(), kMessageBytes - 1);
  std::copy_n(message.data(), length, last_error);
  last_error[length] = '\0';
  return status;
}

static_assert(MISA_INVALID_ARGUMENT == static_cast<int>(misa::ErrorCode::invalid_argument));
static_assert(MISA_UNSUPPORTED == static_cast<int>(misa::ErrorCode::unsupported));
static_assert(MISA_WORKSPACE == static_cast<int>(misa::ErrorCode::workspace));
static_assert(MISA_IO == static_cast<int>(misa::ErrorCode::io));
static_assert(MISA_INTERNAL == static_cast<int>(misa::ErrorCode::internal));
static_assert(MISA_F32 == static_cast<int>(misa::DType::f32));
static_assert(MISA_BF16 == static_cast<int>(misa::DType::bf16));
static_assert(MISA_E4M3 == static_cast<int>(misa::DType::e4m3));
static_assert(MISA_SCALE_F32 == static_cast<int>(misa::ScaleFormat::f32));
static_assert(MISA_SCALE_UE8M0 == static_cast<int>(misa::ScaleFormat::ue8m0));
static_assert(MISA_ROUTER_ALL == static_cast<int>(misa::Router::all));
static_assert(MISA_ROUTER_POOLED == static_cast<int>(misa::Router::pooled));
static_assert(MISA_ROUTER_NONLINEARITY == static_cast<int>(misa::Router::nonlinearity));
static_assert(MISA_ROUTER_DISPERSION == static_cast<int>(misa::Router::dispersion));
static_assert(MISA_ROUTER_SELF == static_cast<int>(misa::Router::self));
static_assert(MISA_ROUTER_QNORM == static_cast<int>(misa::Router::qnorm));
static_assert(MISA_ROUTER_WEIGHT == static_cast<int>(misa::Router::weight));
static_assert(MISA_ROUTER_STATIC == static_cast<int>(misa::Router::fixed));

template <class Body>
misa_status guarded(const Body& body) noexcept {
  try {
    body();
    return MISA_OK;
  } catch (const misa::Error& error) {
    return fail(static_cast<misa_status>(error.code()), error.what());
  } catch (const std::bad_alloc&) {
    return fail(MISA_OUT_OF_MEMORY, "memory: expected more to be available, got none");
  } catch (const std::exception& error) {
    return fail(MISA_INTERNAL, error.what());
  } catch (...) {
    return fail(MISA_INTERNAL, "internal: expected a known exception, got another");
  }
}

template <class T>
T& deref(std::string_view name, T* pointer) {
  misa::require(pointer != nullptr, "{}: expected a pointer, got null", name);
  return *pointer;
}

// Converts an int32 to the enumeration E. A value that E does not name is refused later, where the
// library validates it.
template <class E>
E enum_from(std::string_view name, std::int32_t value) {
  misa::require(value >= 0 && value <= 255, "{}: expected a named value, got {}", name, value);
  return static_cast<E>(value);
}

// Refuses a null array with a count above 0 here, where the argument's name is known.
template <class T>
std::span<T> span_from(std::string_view name, T* data, std::size_t count) {
  misa::require(data != nullptr || count == 0, "{}: expected {} elements, got null", name, count);
  return {data, count};
}

misa::IndexerConfig config_from(const misa_config& c) {
  misa::IndexerConfig config;
  config.top_k = c.top_k;
  config.router = enum_from<misa::Router>("router", c.router);
  config.heads = c.heads;
  config.block = c.block;
  config.residual = c.residual != 0;
  config.filter_block = c.filter_block;
  config.filter_blocks = c.filter_blocks;
  config.candidates = c.candidates;
  config.ordered = c.ordered != 0;
  const auto heads = span_from("static_heads", c.static_heads, c.static_head_count);
  config.static_heads.assign(heads.begin(), heads.end());
  config.dense_work = c.dense_work;
  config.sketch = c.sketch;
  return config;
}

misa::Shape shape_from(const misa_shape& s) {
  return {s.tokens,
          s.heads,
          s.dim,
          s.max_keys,
          enum_from<misa::DType>("q_dtype", s.q_dtype),
          enum_from<misa::DType>("k_dtype", s.k_dtype)};
}

misa::Queries queries_from(const misa_queries& q) {
  return {
      q.data,       enum_from<misa::DType>("q", q.dtype), q.tokens, q.heads, q.dim, q.token_stride,
      q.head_stride};
}

misa::Weights weights_from(const misa_weights& w) {
  return {w.data, w.tokens, w.heads, w.token_stride};
}

misa::RaggedKeys keys_from(const misa_ragged_keys& k) {
  return {k.data,
          enum_from<misa::DType>("k", k.dtype),
          k.tokens,
          k.dim,
          k.token_stride,
          k.scale,
          span_from("ks", k.starts, k.start_count),
          span_from("ke", k.ends, k.end_count)};
}

misa::RaggedMeans means_from(const misa_ragged_means& m) {
  return {m.data,
          m.count,
          m.dim,
          m.row_stride,
          span_from("starts", m.starts, m.start_count),
          span_from("ends", m.ends, m.end_count),
          span_from("partial", m.partial, m.partial_count)};
}

std::int64_t page_size_from(std::int64_t page_size) {
  return page_size == 0 ? misa::kPageSize : page_size;
}

// A CacheView or a CacheSpan, whose fields are in the same order.
template <class Cache, class From>
Cache cache_from(const From& c) {
  return {c.data,
          c.pages,
          c.dim,
          c.page_stride,
          c.page_sums,
          page_size_from(c.page_size),
          c.page_sums_stride,
          c.largest_scales,
          c.largest_scales_stride,
          c.sketch,
          c.sketch_bits,
          c.sketch_stride};
}

misa::CacheView view_from(const misa_cache_view& c) { return cache_from<misa::CacheView>(c); }
misa::CacheSpan span_of(const misa_cache_span& c) { return cache_from<misa::CacheSpan>(c); }

misa::PagedKeys keys_from(const misa_paged_keys& k) {
  return {view_from(k.cache),
          k.block_table,
          k.max_pages,
          k.block_table_stride,
          span_from("context_lens", k.context_lens, k.batch),
          k.next_n,
          span_from("query_starts", k.query_starts, k.query_start_count),
          span_from("row_lens", k.row_lens, k.row_len_count)};
}

misa::Selection selection_from(const misa_selection& s) {
  return {span_from("indices", s.indices, s.index_count),
          span_from("scores", s.scores, s.score_count),
          span_from("heads", s.heads, s.head_count),
          span_from("residual", s.residual, s.residual_count),
          s.index_stride,
          s.score_stride,
          s.slots != 0,
          span_from("offsets", s.offsets, s.offset_count)};
}

misa::NewKeys new_keys_from(const misa_new_keys& k) {
  return {k.data, enum_from<misa::DType>("k", k.dtype), k.tokens, k.dim, k.token_stride};
}

// `stream`: for a plan on a device, the stream; otherwise nothing.
template <class Plan, class Keys, class... Stream>
misa_status run(const Plan* plan, const misa_queries* q, const misa_weights* w, const Keys* k,
                const misa_selection* out, void* workspace, std::size_t workspace_bytes,
                Stream*... stream) noexcept {
  return guarded([&] {
    deref("plan", plan)
        .plan.run(queries_from(deref("q", q)), weights_from(deref("w", w)),
                  keys_from(deref("k", k)), selection_from(deref("out", out)),
                  span_from("workspace", static_cast<std::byte*>(workspace), workspace_bytes),
                  stream...);
  });
}

// Calls misa::route_from_means or misa::keep_blocks_from_means.
template <class Call>
misa_status run_from_means(const Call& call, const misa_context* context, const misa_queries* q,
                           const misa_weights* w, const misa_ragged_means* means,
                           std::int32_t width, std::int32_t* out, std::size_t out_count) noexcept {
  return guarded([&] {
    call(deref("context", context).context, queries_from(deref("q", q)),
         weights_from(deref("w", w)), means_from(deref("means", means)), width,
         span_from("out", out, out_count));
  });
}

const std::vector<misa::BackendInfo>& backend_list() {
  static const std::vector<misa::BackendInfo> list = misa::backends();
  return list;
}

}  // namespace

const char* misa_last_error() noexcept { return last_error; }

const char* misa_version() noexcept { return MISA_VERSION; }

misa_status misa_backend_count(std::size_t* count) noexcept {
  return guarded([&] { deref("count", count) = backend_list().size(); });
}

misa_status misa_backend_at(std::size_t index, misa_backend_info* info) noexcept {
  return guarded([&] {
    const auto& list = backend_list();
    misa::require(index < list.size(), "index: expected 0 to {}, got {}", list.size() - 1, index);
    const misa::BackendInfo& backend = list[index];
    deref("info", info) = {backend.name.c_str(), backend.isa.c_str(), backend.requirement.c_str(),
                           backend.available ? 1 : 0, backend.priority};
  });
}

std::size_t misa_default_workspace_cap() noexcept { return misa::kDefaultWorkspaceCap; }

misa_status misa_context_create(const misa_context_options* options,
                                misa_context** context) noexcept {
  return guarded([&] {
    deref("context", context);
    misa::ContextOptions chosen;
    if (options != nullptr) {
      chosen.backend = options->backend != nullptr ? options->backend : chosen.backend;
      chosen.threads = options->threads;
      chosen.workspace_cap =
          options->workspace_cap != 0 ? options->workspace_cap : chosen.workspace_cap;
    }
    *context = new misa_context{misa::Context(chosen)};
  });
}

void misa_context_destroy(misa_context* context) noexcept { delete context; }

misa_status misa_config_by_name(const char* indexer, misa_config* config) noexcept {
  return guarded([&] {
    const misa::IndexerConfig named = misa::indexer_by_name(&deref("indexer", indexer));
    deref("config", config) = {named.top_k,
                               static_cast<std::int32_t>(named.router),
                               named.heads,
                               named.block,
                               named.residual ? 1 : 0,
                               named.filter_block,
                               named.filter_blocks,
                               named.candidates,
                               named.ordered ? 1 : 0,
                               nullptr,
                               0,
                               named.dense_work,
                               named.sketch};
  });
}

misa_status misa_plan_create(const misa_context* context, const misa_config* config,
                             const misa_shape* shape, misa_plan** plan) noexcept {
  return guarded([&] {
    deref("plan", plan);
    *plan = new misa_plan{misa::Plan(deref("context", context).context,
                                     config_from(deref("config", config)),
                                     shape_from(deref("shape", shape)))};
  });
}

void misa_plan_destroy(misa_plan* plan) noexcept { delete plan; }

misa_status misa_plan_workspace_bytes(const misa_plan* plan, std::size_t* bytes) noexcept {
  return guarded([&] { deref("bytes", bytes) = deref("plan", plan).plan.workspace_bytes(); });
}

misa_status misa_run_ragged(const misa_plan* plan, const misa_queries* q, const misa_weights* w,
                            const misa_ragged_keys* k, const misa_selection* out, void* workspace,
                            std::size_t workspace_bytes) noexcept {
  return run(plan, q, w, k, out, workspace, workspace_bytes);
}

misa_status misa_run_paged(const misa_plan* plan, const misa_queries* q, const misa_weights* w,
                           const misa_paged_keys* k, const misa_selection* out, void* workspace,
                           std::size_t workspace_bytes) noexcept {
  return run(plan, q, w, k, out, workspace, workspace_bytes);
}

misa_status misa_route_from_means(const misa_context* context, const misa_queries* q,
                                  const misa_weights* w, const misa_ragged_means* means,
                                  std::int32_t heads, std::int32_t* out,
                                  std::size_t out_count) noexcept {
  return run_from_means(misa::route_from_means, context, q, w, means, heads, out, out_count);
}

misa_status misa_keep_blocks_from_means(const misa_context* context, const misa_queries* q,
                                        const misa_weights* w, const misa_ragged_means* means,
                                        std::int32_t filter_blocks, std::int32_t* out,
                                        std::size_t out_count) noexcept {
  return run_from_means(misa::keep_blocks_from_means, context, q, w, means, filter_blocks, out,
                        out_count);
}

misa_status misa_cache_bytes(std::int64_t pages, std::int64_t dim, std::int64_t page_size,
                             std::int64_t* bytes) noexcept {
  return guarded(
      [&] { deref("bytes", bytes) = misa::cache_bytes(pages, dim, page_size_from(page_size)); });
}

misa_status misa_cache_page_tail(std::int64_t dim, std::int64_t page_size, std::int32_t sketch_bits,
                                 misa_page_tail* tail) noexcept {
  return guarded([&] {
    misa_page_tail& written = deref("tail", tail);
    const misa::PageTail from = misa::page_tail(dim, page_size_from(page_size), sketch_bits);
    written = {from.page_sums, from.largest_scales, from.sketch, from.page_stride};
  });
}

misa_status misa_cache_quantize(const float* key, std::size_t dim, std::int32_t scale_format,
                                std::uint8_t* out, float* scale) noexcept {
  return guarded([&] {
    float& written = deref("scale", scale);
    written = misa::quantize(span_from("key", key, dim),
                             enum_from<misa::ScaleFormat>("scale_format", scale_format),
                             span_from("out", out, dim));
  });
}

misa_status misa_cache_append(const misa_cache_span* cache, const misa_new_keys* keys,
                              const std::int64_t* slots, std::size_t slot_count,
                              std::int32_t scale_format) noexcept {
  return guarded([&] {
    misa::append(span_of(deref("cache", cache)), new_keys_from(deref("keys", keys)),
                 span_from("slots", slots, slot_count),
                 enum_from<misa::ScaleFormat>("scale_format", scale_format));
  });
}

misa_status misa_cache_copy_pages(const misa_cache_view* source, const std::int32_t* from,
                                  const misa_cache_span* target, const std::int32_t* to,
                                  std::size_t count) noexcept {
  return guarded([&] {
    misa::copy_pages(view_from(deref("source", source)), span_from("from", from, count),
                     span_of(deref("target", target)), span_from("to", to, count));
  });
}

misa_status misa_cache_rebuild(const misa_cache_span* cache, const std::int32_t* pages,
                               const std::int32_t* filled, std::size_t count) noexcept {
  return guarded([&] {
    misa::rebuild(span_of(deref("cache", cache)), span_from("pages", pages, count),
                  {filled, filled != nullptr ? count : 0});
  });
}

misa_status misa_cache_gather(const misa_cache_view* cache, const std::int32_t* block_table,
                              std::size_t block_table_count, std::int64_t tokens, std::uint8_t* k,
                              float* scale) noexcept {
  return guarded([&] {
    const misa_cache_view& from = deref("cache", cache);
    misa::require(tokens >= 0, "tokens: expected 0 or more, got {}", tokens);
    const auto key_bytes =
        static_cast<std::size_t>(misa::checked_multiply_add("tokens", tokens, from.dim));
    misa::gather(view_from(from), span_from("block_table", block_table, block_table_count), tokens,
                 span_from("k", k, key_bytes),
                 span_from("scale", scale, static_cast<std::size_t>(tokens)));
  });
}

misa_status misa_cuda_plan_create(const misa_config* config, const misa_shape* shape,
                                  const misa_cuda_plan_options* options,
                                  misa_cuda_plan** plan) noexcept {
  return guarded([&] {
    deref("plan", plan);
    const misa_cuda_plan_options& from = deref("options", options);
    misa::cuda::PlanOptions chosen;
    chosen.total_keys = from.total_keys;
    chosen.batch = from.batch;
    chosen.workspace_cap = from.workspace_cap != 0 ? from.workspace_cap : chosen.workspace_cap;
    chosen.backend = from.backend != nullptr ? from.backend : chosen.backend;
    chosen.max_sms = from.max_sms;
    *plan = new misa_cuda_plan{misa::cuda::Plan(config_from(deref("config", config)),
                                                shape_from(deref("shape", shape)), chosen)};
  });
}

void misa_cuda_plan_destroy(misa_cuda_plan* plan) noexcept { delete plan; }

misa_status misa_cuda_plan_workspace_bytes(const misa_cuda_plan* plan,
                                           std::size_t* bytes) noexcept {
  return guarded([&] { deref("bytes", bytes) = deref("plan", plan).plan.workspace_bytes(); });
}

misa_status misa_cuda_run_ragged(const misa_cuda_plan* plan, const misa_queries* q,
                                 const misa_weights* w, const misa_ragged_keys* k,
                                 const misa_selection* out, void* workspace,
                                 std::size_t workspace_bytes, void* stream) noexcept {
  return run(plan, q, w, k, out, workspace, workspace_bytes, stream);
}

misa_status misa_cuda_run_paged(const misa_cuda_plan* plan, const misa_queries* q,
                                const misa_weights* w, const misa_paged_keys* k,
                                const misa_selection* out, void* workspace,
                                std::size_t workspace_bytes, void* stream) noexcept {
  return run(plan, q, w, k, out, workspace, workspace_bytes, stream);
}

misa_status misa_cuda_top_k(const misa_cuda_logits* logits, std::int32_t top_k,
                            const misa_cuda_top_k_output* out, void* stream) noexcept {
  return guarded([&] {
    const misa_cuda_logits& in = deref("logits", logits);
    const misa_cuda_top_k_output& to = deref("out", out);
    misa::cuda::top_k({in.data, in.rows, in.columns, in.row_stride, in.lengths}, top_k,
                      {to.indices, to.scores, to.index_stride, to.score_stride}, stream);
  });
}

misa_status misa_cuda_cache_append(const misa_cache_span* cache, const misa_new_keys* keys,
                                   const std::int64_t* slots, std::size_t slot_count,
                                   std::int32_t scale_format, void* stream) noexcept {
  return guarded([&] {
    const misa::CacheSpan to = span_of(deref("cache", cache));
    const auto at = span_from("slots", slots, slot_count);
    if (keys == nullptr) {
      misa::cuda::append(to, at, stream);
    } else {
      misa::cuda::append(to, new_keys_from(*keys), at, stream,
                         enum_from<misa::ScaleFormat>("scale_format", scale_format));
    }
  });
}

misa_status misa_cuda_cache_copy_pages(const misa_cache_view* source, const std::int32_t* from,
                                       const misa_cache_span* target, const std::int32_t* to,
                                       std::size_t count, void* stream) noexcept {
  return guarded([&] {
    misa::cuda::copy_pages(view_from(deref("source", source)), span_from("from", from, count),
                           span_of(deref("target", target)), span_from("to", to, count), stream);
  });
}

misa_status misa_cuda_cache_rebuild(const misa_cache_span* cache, const std::int32_t* pages,
                                    const std::int32_t* filled, std::size_t count,
                                    void* stream) noexcept {
  return guarded([&] {
    misa::cuda::rebuild(span_of(deref("cache", cache)), span_from("pages", pages, count),
                        {filled, filled != nullptr ? count : 0}, stream);
  });
}
