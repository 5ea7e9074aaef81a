// SPDX-License-Identifier: Apache-2.0
#include "api/validate.hpp"

#include <algorithm>
#include <bitset>
#include <limits>

#include "cache/cache.hpp"
#include "core/key_source.hpp"
#include "core/require.hpp"
#include "core/workspace.hpp"

namespace misa {
namespace {

constexpr std::int64_t kMaxKeys = std::numeric_limits<std::int32_t>::max();  // positions are int32
constexpr std::int64_t kMaxMeans = kMaxKeys / 2;  // CUDA kernels count two positions per block mean

void validate_dtype(std::string_view name, DType dtype) {
  require(dtype == DType::f32 || dtype == DType::bf16 || dtype == DType::e4m3,
          "{}: expected f32, bf16 or e4m3, got dtype {}", name, static_cast<int>(dtype));
}

void validate_dim(std::string_view name, std::int64_t dim) {
  require(dim == 64 || dim == 128, "{}: expected D = 64 or 128, got {}", name, dim);
}

void validate_heads(std::string_view name, std::int64_t heads) {
  require(heads >= 1 && heads <= kMaxHeads, "{}: expected H = 1 to {}, got {}", name, kMaxHeads,
          heads);
}

void validate_count(std::string_view name, std::string_view what, std::int64_t count) {
  require(count >= 0, "{}: expected {} = 0 or more, got {}", name, what, count);
}

// The stride of `count` entries of `least` elements each, where 0 means dense. With fewer than two
// entries the stride is never used, so every value is accepted.
std::int64_t resolved_stride(std::string_view name, std::string_view what, std::int64_t stride,
                             std::int64_t least, std::int64_t count) {
  if (stride == 0 || count < 2) {
    return least;
  }
  require(stride >= least, "{}: expected a {} stride of at least {}, got {}", name, what, least,
          stride);
  return stride;
}

// Checks that the size of `count` rows in bytes does not overflow, and checks their pointer.
void validate_rows(std::string_view name, const void* data, std::int64_t count, std::int64_t stride,
                   std::size_t element) {
  const std::int64_t elements = checked_multiply_add(name, count, stride);
  checked_multiply_add(name, elements, static_cast<std::int64_t>(element));
  require_data(name, data, count, element);
}

void validate_static_heads(const IndexerConfig& config, std::int64_t heads) {
  const std::vector<std::int32_t>& list = config.static_heads;
  require(std::ssize(list) == config.heads, "static_heads: expected {} (heads), got {}",
          config.heads, list.size());
  std::bitset<kMaxHeads> seen;
  for (std::size_t i = 0; i < list.size(); ++i) {
    require(list[i] >= 0 && list[i] < heads, "static_heads[{}]: expected 0 to {}, got {}", i,
            heads - 1, list[i]);
    require(!seen[list[i]], "static_heads[{}]: expected distinct heads, got {} again", i, list[i]);
    seen[list[i]] = true;
  }
}

void validate_routing(const IndexerConfig& config, std::int64_t heads) {
  require(config.router <= Router::fixed, "router: expected one of 0 to {}, got {}",
          static_cast<int>(Router::fixed), static_cast<int>(config.router));
  if (config.router == Router::all) {
    require(!config.residual, "residual: expected a router that leaves heads out, got 'all'");
  } else {
    const int least = config.residual ? 0 : 1;
    require(config.heads >= least && config.heads <= heads, "heads: expected {} to H = {}, got {}",
            least, heads, config.heads);
  }
  require(config.block >= kGroupSize && config.block % kGroupSize == 0,
          "block: expected a multiple of {}, got {}", kGroupSize, config.block);
  if (config.router == Router::fixed) {
    validate_static_heads(config, heads);
  } else {
    require(config.static_heads.empty(), "static_heads: expected none with router '{}', got {}",
            name_of(config.router), config.static_heads.size());
  }
}

void validate_sketch(const IndexerConfig& config, DType k_dtype) {
  if (config.sketch == 0) {
    return;
  }
  require(config.sketch == 2 || config.sketch == 4, "sketch: expected 0 (none), 2 or 4, got {}",
          config.sketch);
  require(k_dtype == DType::e4m3, "sketch: expected 0 (none) with {} keys, got {}",
          name_of(k_dtype), config.sketch);
  require(config.candidates > 0,
          "candidates: expected at least top_k = {} with a sketch, which needs a re-rank, got 0",
          config.top_k);
}

void validate_filter(const IndexerConfig& config) {
  if (config.filter_block == 0) {
    return;
  }
  require(config.filter_block >= kGroupSize && config.filter_block % kGroupSize == 0,
          "filter_block: expected a multiple of {} or 0 (none), got {}", kGroupSize,
          config.filter_block);
  // The first and the last block are always kept, and the last one may have a single visible
  // position.
  require(config.filter_blocks >= 2, "filter_blocks: expected 2 or more, got {}",
          config.filter_blocks);
  const std::int64_t least = (std::int64_t{config.filter_blocks} - 1) * config.filter_block + 1;
  require(least >= config.top_k,
          "filter_blocks: expected enough for top_k = {} positions, got {}, which may keep only {}",
          config.top_k, config.filter_blocks, least);
}

template <class T>
void validate_output(std::string_view name, std::span<T> out, bool exists, std::string_view because,
                     std::int64_t rows, std::int64_t columns) {
  if (out.empty()) {
    return;
  }
  require(exists, "{}: expected none {}, got {} elements", name, because, out.size());
  require(std::ssize(out) == checked_multiply_add(name, rows, columns),
          "{}: expected {} * {} elements, got {}", name, rows, columns, out.size());
  require_data(name, out.data(), std::ssize(out), alignof(T));
}

// Checks an output [rows, columns] whose rows may have a stride, and returns their actual stride.
template <class T>
std::int64_t validated_rows(std::string_view name, std::span<T> out, std::int64_t rows,
                            std::int64_t columns, std::int64_t stride) {
  const std::int64_t actual = resolved_stride(name, "row", stride, columns, rows);
  if (!out.empty()) {
    const std::int64_t size = rows > 0 ? checked_multiply_add(name, rows - 1, actual, columns) : 0;
    require(std::ssize(out) == size, "{}: expected {} * {} elements, got {} with rows {} apart",
            name, rows, columns, out.size(), actual);
    require_data(name, out.data(), std::ssize(out), alignof(T));
  }
  return actual;
}

// Checks an output that is not optional.
void validate_whole_output(std::span<const std::int32_t> out, std::int64_t rows,
                           std::int64_t columns) {
  require(std::ssize(out) == checked_multiply_add("out", rows, columns),
          "out: expected {} * {} elements, got {}", rows, columns, out.size());
  require_data("out", out.data(), std::ssize(out), alignof(std::int32_t));
}

}  // namespace

void validate(const IndexerConfig& config, const Shape& shape) {
  validate_count("shape", "T", shape.tokens);
  validate_heads("shape", shape.heads);
  validate_dim("shape", shape.dim);
  require(shape.max_keys >= 0 && shape.max_keys <= kMaxKeys,
          "shape: expected max_keys = 0 to {}, got {}", kMaxKeys, shape.max_keys);
  validate_dtype("shape.q_dtype", shape.q_dtype);
  validate_dtype("shape.k_dtype", shape.k_dtype);

  require(config.top_k >= 1, "top_k: expected 1 or more, got {}", config.top_k);
  checked_multiply_add("top_k", shape.tokens, config.top_k);
  validate_routing(config, shape.heads);
  validate_filter(config);
  require(config.candidates == 0 || config.candidates >= config.top_k,
          "candidates: expected 0 (no re-rank) or at least top_k = {}, got {}", config.top_k,
          config.candidates);
  validate_sketch(config, shape.k_dtype);
  require(config.dense_work >= 0, "dense_work: expected 0 (none) or more, got {}",
          config.dense_work);
}

Queries validated(const Queries& q) {
  validate_dtype("q", q.dtype);
  validate_count("q", "T", q.tokens);
  validate_heads("q", q.heads);
  validate_dim("q", q.dim);
  Queries resolved = q;
  // Tokens or heads may be the outer dimension, whose stride is at least the extent of the inner
  // one.
  const auto extent = [&](std::int64_t count, std::int64_t stride) {
    return checked_multiply_add("q", std::max<std::int64_t>(count - 1, 0), stride, q.dim);
  };
  if (q.token_stride > 0 && q.tokens > 1 && q.head_stride > q.token_stride) {
    resolved.token_stride = resolved_stride("q", "token", q.token_stride, q.dim, q.tokens);
    resolved.head_stride = resolved_stride("q", "head", q.head_stride,
                                           extent(q.tokens, resolved.token_stride), q.heads);
  } else {
    // The dense token stride is H head strides, the last head's padding included. The head stride
    // then matters even for a single head.
    const bool separates_tokens = q.token_stride == 0 && q.tokens > 1;
    const std::int64_t strided = separates_tokens ? q.heads + 1 : q.heads;
    resolved.head_stride =
        resolved_stride("q", "head", q.head_stride, q.dim, q.tokens > 0 ? strided : 0);
    const std::int64_t padded = checked_multiply_add("q", q.heads, resolved.head_stride);
    resolved.token_stride = q.token_stride == 0
                                ? padded
                                : resolved_stride("q", "token", q.token_stride,
                                                  extent(q.heads, resolved.head_stride), q.tokens);
  }
  const std::int64_t elements =
      checked_multiply_add("q", std::max<std::int64_t>(q.tokens - 1, 0), resolved.token_stride,
                           extent(q.heads, resolved.head_stride));
  checked_multiply_add("q", elements, static_cast<std::int64_t>(size_of(q.dtype)));
  require_data("q", q.data, q.tokens, size_of(q.dtype));
  return resolved;
}

Weights validated(const Weights& w, const Queries& q) {
  require(w.tokens == q.tokens, "w: expected T = {} as q has, got {}", q.tokens, w.tokens);
  require(w.heads == q.heads, "w: expected H = {} as q has, got {}", q.heads, w.heads);
  Weights resolved = w;
  resolved.token_stride = resolved_stride("w", "token", w.token_stride, w.heads, w.tokens);
  validate_rows("w", w.data, w.tokens, resolved.token_stride, sizeof(float));
  return resolved;
}

RaggedKeys validated_layout(const RaggedKeys& k, const Queries& q) {
  validate_dtype("k", k.dtype);
  require(k.tokens >= 0 && k.tokens <= kMaxKeys, "k: expected L = 0 to {}, got {}", kMaxKeys,
          k.tokens);
  require(k.dim == q.dim, "k: expected D = {} as q has, got {}", q.dim, k.dim);
  RaggedKeys resolved = k;
  resolved.token_stride = resolved_stride("k", "token", k.token_stride, k.dim, k.tokens);
  validate_rows("k", k.data, k.tokens, resolved.token_stride, size_of(k.dtype));
  if (k.dtype == DType::e4m3) {
    require_data("k_scale", k.scale, k.tokens, alignof(float));
  } else {
    require(k.scale == nullptr, "k_scale: expected none with {} keys, got an array",
            name_of(k.dtype));
  }
  require(std::ssize(k.starts) == q.tokens, "ks: expected {} entries (T), got {}", q.tokens,
          k.starts.size());
  require(std::ssize(k.ends) == q.tokens, "ke: expected {} entries (T), got {}", q.tokens,
          k.ends.size());
  require_data("ks", k.starts.data(), q.tokens, alignof(std::int32_t));
  require_data("ke", k.ends.data(), q.tokens, alignof(std::int32_t));
  return resolved;
}

void validate_means_sizes(std::int64_t tokens, std::int64_t dim, std::int64_t count) {
  validate_count("q", "T", tokens);
  validate_dim("q", dim);
  require(count >= 0 && count <= kMaxMeans, "means: expected M = 0 to {}, got {}", kMaxMeans,
          count);
  checked_multiply_add("q", tokens, dim * std::int64_t{sizeof(float)});
}

RaggedMeans validated_layout(const RaggedMeans& means, const Queries& q) {
  validate_means_sizes(q.tokens, q.dim, means.count);
  require(means.dim == q.dim, "means: expected D = {} as q has, got {}", q.dim, means.dim);
  RaggedMeans resolved = means;
  resolved.row_stride = resolved_stride("means", "row", means.row_stride, means.dim, means.count);
  validate_rows("means", means.data, means.count, resolved.row_stride, sizeof(float));
  require(std::ssize(means.starts) == q.tokens, "starts: expected {} entries (T), got {}", q.tokens,
          means.starts.size());
  require(std::ssize(means.ends) == q.tokens, "ends: expected {} entries (T), got {}", q.tokens,
          means.ends.size());
  require(means.partial.empty() || std::ssize(means.partial) == q.tokens,
          "partial: expected {} entries (T) or none, got {}", q.tokens, means.partial.size());
  require_data("starts", means.starts.data(), q.tokens, alignof(std::int32_t));
  require_data("ends", means.ends.data(), q.tokens, alignof(std::int32_t));
  require_data("partial", means.partial.data(), std::ssize(means.partial), alignof(std::int32_t));
  return resolved;
}

RaggedMeans validated(const RaggedMeans& means, const Queries& q) {
  const RaggedMeans resolved = validated_layout(means, q);
  for (std::size_t t = 0; t < means.starts.size(); ++t) {
    require(means.starts[t] >= 0 && means.starts[t] <= means.count,
            "starts[{}]: expected 0 to M = {}, got {}", t, means.count, means.starts[t]);
    require(means.ends[t] >= 0 && means.ends[t] <= means.count,
            "ends[{}]: expected 0 to M = {}, got {}", t, means.count, means.ends[t]);
  }
  for (std::size_t t = 0; t < means.partial.size(); ++t) {
    require(means.partial[t] >= -1 && means.partial[t] < means.count,
            "partial[{}]: expected -1 (none) to M - 1 = {}, got {}", t, means.count - 1,
            means.partial[t]);
  }
  return resolved;
}

RaggedKeys validated(const RaggedKeys& k, const Queries& q) {
  const RaggedKeys resolved = validated_layout(k, q);
  for (std::size_t t = 0; t < k.starts.size(); ++t) {
    require(k.starts[t] >= 0 && k.starts[t] <= k.tokens, "ks[{}]: expected 0 to L = {}, got {}", t,
            k.tokens, k.starts[t]);
    require(k.ends[t] >= 0 && k.ends[t] <= k.tokens, "ke[{}]: expected 0 to L = {}, got {}", t,
            k.tokens, k.ends[t]);
  }
  return resolved;
}

std::int64_t batch_of(const PagedKeys& k, const Queries& q) {
  if (!k.query_starts.empty()) {
    return std::ssize(k.query_starts) - 1;
  }
  return k.context_lens.empty() && !k.row_lens.empty() ? q.tokens / k.next_n
                                                       : std::ssize(k.context_lens);
}

PagedKeys validated_layout(const PagedKeys& k, const Queries& q) {
  PagedKeys resolved = k;
  resolved.cache = validated(k.cache);
  require(k.cache.dim == q.dim, "cache: expected D = {} as q has, got {}", q.dim, k.cache.dim);
  require(k.next_n >= 1, "next_n: expected 1 or more, got {}", k.next_n);
  require(k.query_starts.empty() || k.next_n == 1, "next_n: expected 1 with query_starts, got {}",
          k.next_n);
  const std::int64_t batch = batch_of(k, q);
  require(!k.query_starts.empty() || checked_multiply_add("next_n", batch, k.next_n) == q.tokens,
          "q: expected T = batch * next_n = {} * {}, got {}", batch, k.next_n, q.tokens);
  require(std::ssize(k.context_lens) == batch || (k.context_lens.empty() && !k.row_lens.empty()),
          "context_lens: expected {} entries, one a sequence of query_starts, got {}", batch,
          k.context_lens.size());
  require(k.row_lens.empty() || std::ssize(k.row_lens) == q.tokens,
          "row_lens: expected {} entries (T) or none, got {}", q.tokens, k.row_lens.size());
  const auto require_span = [](std::string_view name, std::span<const std::int32_t> values) {
    require_data(name, values.data(), std::ssize(values), alignof(std::int32_t));
  };
  require_span("context_lens", k.context_lens);
  require_span("query_starts", k.query_starts);
  require_span("row_lens", k.row_lens);
  validate_count("block_table", "max_pages", k.max_pages);
  resolved.block_table_stride = resolved_stride("block_table", "row", k.block_table_stride,
                                                k.max_pages, k.max_pages == 0 ? 0 : batch);
  validate_rows("block_table", k.block_table, k.max_pages == 0 ? 0 : batch,
                resolved.block_table_stride, sizeof(std::int32_t));
  checked_multiply_add("block_table", k.max_pages, k.cache.page_size);
  return resolved;
}

namespace {

void validate_query_starts(std::span<const std::int32_t> starts, std::int64_t tokens) {
  std::int64_t least = 0;
  for (std::size_t b = 0; b < starts.size(); ++b) {
    const std::int64_t most = b == 0 ? 0 : tokens;
    require(starts[b] >= least && starts[b] <= most,
            "query_starts[{}]: expected {} to {}, ascending from 0 to T = {}, got {}", b, least,
            most, tokens, starts[b]);
    least = starts[b];
  }
  require(starts.empty() || least == tokens, "query_starts[{}]: expected T = {}, got {}",
          starts.size() - 1, tokens, least);
}

// Checks lengths against the table's width.
void validate_lengths(std::string_view name, std::span<const std::int32_t> lengths,
                      const PagedKeys& k) {
  const std::int64_t capacity = k.max_pages * k.cache.page_size;
  for (std::size_t i = 0; i < lengths.size(); ++i) {
    require(lengths[i] <= capacity, "{}[{}]: expected at most max_pages * {} = {}, got {}", name, i,
            k.cache.page_size, capacity, lengths[i]);
  }
}

// Checks the entries of the block table that `length` keys of sequence b use.
void validate_pages(const PagedKeys& k, std::int64_t b, std::int64_t length) {
  for (std::int64_t i = 0; i * k.cache.page_size < length; ++i) {
    const std::int32_t page = k.block_table[b * k.block_table_stride + i];
    require(page >= 0 && page < k.cache.pages,
            "block_table[{}, {}]: expected a page from 0 to {}, got {}", b, i, k.cache.pages - 1,
            page);
  }
}

}  // namespace

PagedKeys validated(const PagedKeys& k, const Queries& q) {
  const PagedKeys resolved = validated_layout(k, q);
  validate_query_starts(k.query_starts, q.tokens);
  if (k.row_lens.empty()) {
    validate_lengths("context_lens", k.context_lens, resolved);
    for (std::int64_t b = 0; b < std::ssize(k.context_lens); ++b) {
      validate_pages(resolved, b, k.context_lens[b]);
    }
  } else {
    validate_lengths("row_lens", k.row_lens, resolved);
    const PagedSource source{resolved};
    for (std::int64_t t = 0; t < q.tokens;) {
      const Sequence rows = source.sequence_at(t, q.tokens);
      const auto lengths =
          k.row_lens.subspan(static_cast<std::size_t>(t), static_cast<std::size_t>(rows.queries));
      validate_pages(resolved, source.sequence_of(t), std::ranges::max(lengths));
      t += rows.queries;
    }
  }
  return resolved;
}

Shape shape_of(const Queries& q, const RaggedKeys& k) {
  std::int64_t longest = 0;
  for (std::size_t t = 0; t < k.starts.size(); ++t) {
    longest = std::max(longest, std::int64_t{k.ends[t]} - k.starts[t]);
  }
  return {q.tokens, q.heads, q.dim, longest, q.dtype, k.dtype};
}

Shape shape_of(const Queries& q, const PagedKeys& k) {
  std::int64_t longest = 0;
  for (const std::int32_t length : k.row_lens.empty() ? k.context_lens : k.row_lens) {
    longest = std::max<std::int64_t>(longest, length);
  }
  return {q.tokens, q.heads, q.dim, longest, q.dtype, DType::e4m3};
}

void validate_planned(const Shape& call, const Shape& planned) {
  require(call.tokens <= planned.tokens, "q: expected T = {} at most, as planned, got {}",
          planned.tokens, call.tokens);
  require(call.heads == planned.heads, "q: expected H = {} as planned, got {}", planned.heads,
          call.heads);
  require(call.dim == planned.dim, "q: expected D = {} as planned, got {}", planned.dim, call.dim);
  require(call.q_dtype == planned.q_dtype, "q: expected {} as planned, got {}",
          name_of(planned.q_dtype), name_of(call.q_dtype));
  require(call.k_dtype == planned.k_dtype, "k: expected {} as planned, got {}",
          name_of(planned.k_dtype), name_of(call.k_dtype));
  require(call.max_keys <= planned.max_keys,
          "k: expected {} keys a query at most, as planned, got {}", planned.max_keys,
          call.max_keys);
}

Selection validated(const Selection& out, const IndexerConfig& config, const Queries& q,
                    const CacheView* cache) {
  Selection resolved = out;
  resolved.index_stride =
      validated_rows("indices", out.indices, q.tokens, config.top_k, out.index_stride);
  resolved.score_stride =
      validated_rows("scores", out.scores, q.tokens, config.top_k, out.score_stride);
  validate_output("heads", out.heads, config.router != Router::all, "with router 'all'", q.tokens,
                  config.heads);
  validate_output("residual", out.residual, config.residual, "without a residual row", q.tokens,
                  q.dim);
  require(!out.slots || cache != nullptr, "slots: expected false with ragged keys, got true");
  if (out.slots) {
    const std::int64_t slots = checked_multiply_add("cache", cache->pages, cache->page_size);
    require(slots <= kMaxKeys + 1, "cache: expected at most 2^31 slots to select them, got {}",
            slots);
  }
  require(out.offsets.empty() || !out.slots, "offsets: expected none with slots, got {} entries",
          out.offsets.size());
  require(out.offsets.empty() || std::ssize(out.offsets) == q.tokens,
          "offsets: expected {} entries (T) or none, got {}", q.tokens, out.offsets.size());
  require_data("offsets", out.offsets.data(), std::ssize(out.offsets), alignof(std::int32_t));
  return resolved;
}

void validate_routed_heads(int heads, std::span<const std::int32_t> out, const Queries& q) {
  require(heads >= 0 && heads <= q.heads, "heads: expected 0 to H = {}, got {}", q.heads, heads);
  validate_whole_output(out, q.tokens, heads);
}

void validate_kept_blocks(int filter_blocks, std::span<const std::int32_t> out, const Queries& q) {
  // The first and the last block are always kept.
  require(filter_blocks >= 2, "filter_blocks: expected 2 or more, got {}", filter_blocks);
  validate_whole_output(out, q.tokens, filter_blocks);
}

void validate_workspace(std::span<const std::byte> workspace, std::size_t bytes) {
  if (workspace.size() < bytes) {
    throw Error(ErrorCode::workspace,
                fmt::format("workspace: expected {} bytes, got {}", bytes, workspace.size()));
  }
  if (bytes > 0) {
    require_data("workspace", workspace.data(), std::ssize(workspace), kWorkspaceAlignment);
  }
}

}  // namespace misa
