// SPDX-License-Identifier: Apache-2.0
// Calls with arguments made from the fuzzer's bytes, backed by heap buffers of exactly the size
// that the views claim. A call that the library accepts must stay inside the buffers (the
// sanitizers check that) and select positions that the query sees; any other call must throw an
// Error. Paged keys must select what the same keys in one array select, bit for bit.
#include <fuzzer/FuzzedDataProvider.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <numeric>
#include <vector>

#include "misa/misa.hpp"

namespace {

using misa::DType;

// Inputs with larger buffers are valid but slow, so they are skipped.
constexpr __int128 kMostBytes = 1 << 20;

// No view of as many bytes can be valid.
constexpr __int128 kAddressable = __int128{1} << 63;

struct Skip {};

class Arguments {
 public:
  Arguments(const std::uint8_t* data, std::size_t size) : data_(data, size) {}

  // A value from a small range; the least one when the fuzzer's bytes are used up.
  std::int64_t in(std::int64_t least, std::int64_t most) {
    return data_.ConsumeIntegralInRange<std::int64_t>(least, most);
  }

  // The right value in most cases, so that enough calls are right as a whole.
  std::int64_t near(std::int64_t right) {
    switch (in(0, 255)) {
      case 250: return -1;
      case 251: return sum(right, -1);
      case 252: return sum(right, 1);
      case 253: return 0;
      case 254: return in(0, 1000);
      case 255: return data_.ConsumeIntegral<std::int64_t>();
      default: return right;
    }
  }
  int near_int(int right) { return static_cast<int>(near(right)); }

  template <class E>
  E enumerator(E last) {
    return static_cast<E>(near_int(static_cast<int>(in(0, static_cast<int>(last)))));
  }

  // 0 asks for the dense stride.
  std::int64_t stride(std::int64_t dense) { return near(in(0, 1) == 0 ? 0 : sum(dense, in(0, 3))); }

  // As many elements as a view claims; one byte if no memory can hold the claim.
  template <class T = std::byte>
  T* claim(__int128 elements, std::size_t element = sizeof(T)) {
    return reinterpret_cast<T*>(bytes(std::clamp<__int128>(elements, -1, kAddressable) *
                                      static_cast<std::int64_t>(element)));
  }

  // A new array, in most cases of the right length, `rows` times `columns`.
  template <class T>
  std::span<T> array(std::int64_t rows, std::int64_t columns = 1) {
    constexpr std::int64_t kMost = 4096;
    const __int128 right = __int128{rows} * columns;
    const std::int64_t count = right < 0 || right > kMost ? 0 : static_cast<std::int64_t>(right);
    const auto size = static_cast<std::size_t>(std::clamp<std::int64_t>(near(count), 0, kMost));
    return {reinterpret_cast<T*>(fill(size * sizeof(T))), size};
  }

  // Ends at the last byte of an allocation and starts on a cache line.
  std::span<std::byte> workspace(std::size_t right) {
    const auto size = near(static_cast<std::int64_t>(right));
    if (size < 0 || size > kMostBytes) {
      throw Skip();
    }
    auto* data = static_cast<std::byte*>(
        ::operator new (static_cast<std::size_t>(size), std::align_val_t{64}));
    workspace_.reset(data);
    return {data, static_cast<std::size_t>(size)};
  }

 private:
  // Wraps around, because the operands may be any numbers.
  static std::int64_t sum(std::int64_t a, std::int64_t b) {
    return static_cast<std::int64_t>(static_cast<std::uint64_t>(a) + static_cast<std::uint64_t>(b));
  }

  struct FreeAligned {
    void operator()(std::byte* data) const { ::operator delete (data, std::align_val_t{64}); }
  };

  std::byte* bytes(__int128 claimed) {
    if (claimed > kMostBytes && claimed < kAddressable) {
      throw Skip();
    }
    const bool honest = claimed >= 0 && claimed < kAddressable;
    const auto size = honest ? static_cast<std::size_t>(claimed) : std::size_t{1};
    switch (near(2)) {
      case 0: return nullptr;
      case 1: return fill(size + 1) + 1;  // misaligned
      default: return fill(size);
    }
  }

  std::byte* fill(std::size_t size) {
    buffers_.emplace_back(new std::byte[size]);
    std::byte* data = buffers_.back().get();
    std::uint32_t state = static_cast<std::uint32_t>(in(0, 255)) * 0x9e3779b9U;
    for (std::size_t i = 0; i < size; ++i) {
      state = state * 1664525U + 1013904223U;
      data[i] = static_cast<std::byte>(state >> 24);
    }
    return data;
  }

  FuzzedDataProvider data_;
  std::vector<std::unique_ptr<std::byte[]>> buffers_;
  std::unique_ptr<std::byte, FreeAligned> workspace_;
};

// The number of elements from the start of the first row to the end of the last.
__int128 extent(std::int64_t rows, __int128 stride, __int128 width) {
  if (rows <= 0) {
    return 0;
  }
  __int128 before = 0;
  const bool huge = __builtin_mul_overflow(__int128{rows} - 1, stride, &before);
  const auto bounded = [](__int128 x) { return std::clamp(x, -kAddressable, kAddressable); };
  return huge ? kAddressable : bounded(before) + bounded(width);
}

struct Sizes {
  std::int64_t tokens;
  std::int64_t heads;
  std::int64_t dim;
  std::int64_t keys;
};

misa::IndexerConfig make_config(Arguments& from, const Sizes& sizes) {
  misa::IndexerConfig config;
  config.top_k = from.near_int(static_cast<int>(from.in(1, 80)));
  config.router = from.enumerator(misa::Router::fixed);
  config.heads = from.near_int(static_cast<int>(from.in(1, sizes.heads)));
  config.block = from.near_int(64 * static_cast<int>(from.in(1, 3)));
  config.residual = config.router != misa::Router::all && from.in(0, 1) == 1;
  config.filter_block = from.near_int(64 * static_cast<int>(from.in(0, 2)));
  config.filter_blocks = from.near_int(static_cast<int>(from.in(2, 4)));
  config.candidates = from.near_int(from.in(0, 1) == 0 ? 0 : config.top_k);
  config.sketch = from.near_int(2 * static_cast<int>(from.in(0, 2)));
  config.ordered = from.in(0, 1) == 1;
  config.dense_work = from.near(from.in(0, 1) == 0 ? 0 : from.in(0, sizes.heads * sizes.keys));
  if (config.router == misa::Router::fixed) {
    for (int j = 0; j < config.heads && j < 300; ++j) {
      config.static_heads.push_back(from.near_int(j));
    }
  }
  return config;
}

misa::Queries make_queries(Arguments& from, const Sizes& sizes) {
  misa::Queries q;
  q.dtype = from.enumerator(DType::e4m3);
  q.tokens = from.near(sizes.tokens);
  q.heads = from.near(sizes.heads);
  q.dim = from.near(sizes.dim);
  q.head_stride = from.stride(sizes.dim);
  q.token_stride = from.stride(sizes.heads * (sizes.dim + 3));
  const std::int64_t head_stride = q.head_stride == 0 ? q.dim : q.head_stride;
  const __int128 stride =
      q.token_stride == 0 ? __int128{q.heads} * head_stride : __int128{q.token_stride};
  q.data = from.claim(extent(q.tokens, stride, extent(q.heads, head_stride, q.dim)),
                      misa::size_of(q.dtype));
  return q;
}

misa::Weights make_weights(Arguments& from, const misa::Queries& q) {
  misa::Weights w;
  w.tokens = from.near(q.tokens);
  w.heads = from.near(q.heads);
  w.token_stride = from.stride(q.heads);
  w.data = from.claim<const float>(
      extent(w.tokens, w.token_stride == 0 ? w.heads : w.token_stride, w.heads));
  return w;
}

misa::RaggedKeys make_ragged(Arguments& from, const Sizes& sizes, const misa::Queries& q) {
  misa::RaggedKeys k;
  k.dtype = from.enumerator(DType::e4m3);
  k.tokens = from.near(sizes.keys);
  k.dim = from.near(q.dim);
  k.token_stride = from.stride(q.dim);
  k.data = from.claim(extent(k.tokens, k.token_stride == 0 ? k.dim : k.token_stride, k.dim),
                      misa::size_of(k.dtype));
  if (from.near(k.dtype == DType::e4m3 ? 1 : 0) != 0) {
    k.scale = from.claim<const float>(k.tokens);
  }
  const auto starts = from.array<std::int32_t>(q.tokens);
  const auto ends = from.array<std::int32_t>(q.tokens);
  for (auto& start : starts) {
    start = from.near_int(static_cast<int>(from.in(0, sizes.keys)));
  }
  for (auto& end : ends) {
    end = from.near_int(static_cast<int>(from.in(0, sizes.keys)));
  }
  k.starts = starts;
  k.ends = ends;
  return k;
}

misa::CacheView make_cache(Arguments& from, const misa::Queries& q) {
  misa::CacheView cache;
  cache.pages = from.near(from.in(0, 6));
  cache.dim = from.near(q.dim);
  cache.page_size = from.near(32 << from.in(0, 2));
  const bool right_dim = cache.dim > 0 && cache.dim < 200;
  const bool right_size = cache.page_size > 0 && cache.page_size < 200;
  const std::int64_t dense = (right_size ? cache.page_size : 64) * (right_dim ? cache.dim + 4 : 68);
  cache.page_stride = from.near(from.in(0, 1) == 0 ? 0 : dense + 4 * from.in(0, 3));
  const std::int64_t page_stride = cache.page_stride == 0 ? dense : cache.page_stride;
  cache.data = from.claim<const std::uint8_t>(extent(cache.pages, page_stride, dense));
  const auto derived = [&](std::int64_t width, std::int64_t& stride) {
    stride = from.stride(width);
    return from.claim<const float>(extent(cache.pages, stride == 0 ? width : stride, width));
  };
  const std::int64_t groups = right_size ? cache.page_size / 64 : 1;
  const std::int64_t wanted = from.near(groups > 0 ? from.in(0, 2) : 0);
  if (wanted != 0) {
    cache.page_sums = derived(groups * (right_dim ? cache.dim : 64), cache.page_sums_stride);
  }
  if (wanted == 2) {
    cache.largest_scales = derived(groups, cache.largest_scales_stride);
  }
  return cache;
}

misa::PagedKeys make_paged(Arguments& from, const Sizes& sizes, const misa::Queries& q) {
  misa::PagedKeys k;
  k.cache = make_cache(from, q);
  const bool starts = from.in(0, 1) == 1;
  const bool rows = from.in(0, 1) == 1;
  k.next_n = from.near(starts ? 1 : from.in(1, 2));
  const std::int64_t per_sequence = starts ? 2 : k.next_n;
  const std::int64_t batch = per_sequence > 0 ? q.tokens / per_sequence : 0;
  const auto lengths = [&](std::int64_t count) {
    const auto lens = from.array<std::int32_t>(count);
    for (auto& len : lens) {
      len = from.near_int(static_cast<int>(from.in(0, sizes.keys)));
    }
    return lens;
  };
  if (!rows || from.in(0, 1) == 1) {
    k.context_lens = lengths(batch);
  }
  if (rows) {
    k.row_lens = lengths(q.tokens);
  }
  if (starts) {
    const auto first = from.array<std::int32_t>(batch + 1);
    for (std::size_t b = 0; b < first.size(); ++b) {
      const std::int64_t right = b + 1 == first.size() ? q.tokens : 2 * static_cast<int>(b);
      first[b] = from.near_int(static_cast<int>(b == 0 ? 0 : right));
    }
    k.query_starts = first;
  }
  const bool right_size = k.cache.page_size > 0 && k.cache.page_size < 200;
  const std::int64_t page_size = right_size ? k.cache.page_size : 64;
  k.max_pages = from.near((sizes.keys + page_size - 1) / page_size);
  k.block_table_stride = from.stride(k.max_pages);
  const std::int64_t table_stride = k.block_table_stride == 0 ? k.max_pages : k.block_table_stride;
  std::int64_t sequences = std::ssize(k.context_lens);
  if (!k.query_starts.empty()) {
    sequences = std::ssize(k.query_starts) - 1;
  } else if (sequences == 0 && !k.row_lens.empty() && k.next_n > 0) {
    sequences = q.tokens / k.next_n;
  }
  const __int128 entries = k.max_pages <= 0 ? 0 : extent(sequences, table_stride, k.max_pages);
  auto* table = from.claim<std::int32_t>(entries);
  const bool writable = table != nullptr && entries <= kMostBytes &&
                        reinterpret_cast<std::uintptr_t>(table) % alignof(std::int32_t) == 0;
  for (std::int64_t i = 0; writable && i < entries; ++i) {
    table[i] = from.near_int(static_cast<int>(from.in(0, k.cache.pages > 0 ? 5 : 0)));
  }
  k.block_table = table;
  return k;
}

std::int64_t visible(const misa::RaggedKeys& k, std::size_t t) {
  return std::int64_t{k.ends[t]} - k.starts[t];
}

std::int64_t sequence_of(const misa::PagedKeys& k, std::size_t t) {
  if (k.query_starts.empty()) {
    return static_cast<std::int64_t>(t) / k.next_n;
  }
  return std::ranges::upper_bound(k.query_starts, static_cast<std::int64_t>(t)) -
         k.query_starts.begin() - 1;
}

std::int64_t visible(const misa::PagedKeys& k, std::size_t t) {
  if (!k.row_lens.empty()) {
    return k.row_lens[t];
  }
  const std::int64_t sequence = sequence_of(k, t);
  const std::int64_t end =
      k.query_starts.empty() ? (sequence + 1) * k.next_n : k.query_starts[sequence + 1];
  return k.context_lens[sequence] - (end - 1 - static_cast<std::int64_t>(t));
}

DType key_type(const misa::RaggedKeys& k) { return k.dtype; }
DType key_type(const misa::PagedKeys& /*k*/) { return DType::e4m3; }

template <class T>
void require_same(const std::vector<T>& a, const std::vector<T>& b) {
  if (a.size() != b.size() ||
      (!a.empty() && std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) != 0)) {
    std::abort();
  }
}

// The page sums that the calls of a cache would keep.
struct PageSums {
  std::vector<float> sums;
  std::vector<float> largest;

  explicit PageSums(misa::CacheView& view) {
    const std::int64_t groups = view.pages * (view.page_size / misa::kGroupSize);
    if (groups == 0) {
      view.page_sums = view.largest_scales = nullptr;
      return;
    }
    sums.resize(static_cast<std::size_t>(groups * view.dim));
    largest.resize(static_cast<std::size_t>(groups));
    misa::CacheSpan cache{const_cast<std::uint8_t*>(view.data), view.pages, view.dim,
                          view.page_stride};
    cache.page_size = view.page_size;
    cache.page_sums = sums.data();
    cache.largest_scales = largest.data();
    std::vector<std::int32_t> pages(static_cast<std::size_t>(view.pages));
    std::iota(pages.begin(), pages.end(), 0);
    misa::rebuild(cache, pages);
    view.page_sums = sums.data();
    view.largest_scales = largest.data();
    view.page_sums_stride = view.largest_scales_stride = 0;
  }
};

void compare_with_ragged(const misa::Context& /*context*/, const misa::IndexerConfig& /*config*/,
                         const misa::Queries& /*q*/, const misa::Weights& /*w*/,
                         const misa::RaggedKeys& /*k*/) {}

// A call that was accepted, so nothing that follows from it may be refused.
void compare_with_ragged(const misa::Context& context, const misa::IndexerConfig& config,
                         const misa::Queries& q, const misa::Weights& w,
                         const misa::PagedKeys& k) noexcept {
  std::vector<std::uint8_t> elements;
  std::vector<float> scales;
  std::vector<std::int32_t> starts;
  std::vector<std::int32_t> ends;
  for (std::size_t t = 0; t < static_cast<std::size_t>(q.tokens); ++t) {
    const auto n = static_cast<std::size_t>(std::max<std::int64_t>(visible(k, t), 0));
    const std::int64_t stride = k.block_table_stride == 0 ? k.max_pages : k.block_table_stride;
    starts.push_back(static_cast<std::int32_t>(scales.size()));
    elements.resize(elements.size() + n * static_cast<std::size_t>(q.dim));
    scales.resize(scales.size() + n);
    ends.push_back(static_cast<std::int32_t>(scales.size()));
    if (n > 0) {
      misa::gather(
          k.cache,
          {k.block_table + sequence_of(k, t) * stride, static_cast<std::size_t>(k.max_pages)},
          static_cast<std::int64_t>(n),
          std::span(elements).last(n * static_cast<std::size_t>(q.dim)), std::span(scales).last(n));
    }
  }
  const misa::RaggedKeys ragged{
      elements.data(), DType::e4m3, std::ssize(scales), q.dim, 0, scales.data(), starts, ends};
  misa::PagedKeys paged = k;
  const PageSums sums(paged.cache);
  const misa::Selected wanted = misa::select(context, config, q, w, ragged, {true, true, true});
  const misa::Selected got = misa::select(context, config, q, w, paged, {true, true, true});
  require_same(got.indices, wanted.indices);
  require_same(got.scores, wanted.scores);
  require_same(got.heads, wanted.heads);
  require_same(got.residual, wanted.residual);
}

template <class Keys>
void run(Arguments& from, const Sizes& sizes, const misa::Queries& q, const misa::Weights& w,
         const Keys& k) {
  static const misa::Context reference({.backend = "reference", .threads = 1});
  static const misa::Context fastest({.backend = "auto", .threads = 1});
  const misa::IndexerConfig config = make_config(from, sizes);
  const misa::Shape shape{
      from.near(q.tokens), from.near(q.heads), from.near(q.dim), from.near(sizes.keys), q.dtype,
      key_type(k)};
  const misa::Context& context = from.in(0, 1) == 0 ? fastest : reference;
  const misa::Plan plan(context, config, shape);
  misa::Selection out;
  out.indices = from.array<std::int32_t>(q.tokens, config.top_k);
  if (from.in(0, 1) == 1) {
    out.scores = from.array<float>(q.tokens, config.top_k);
  }
  if (from.near(config.router == misa::Router::all ? 0 : from.in(0, 1)) != 0) {
    out.heads = from.array<std::int32_t>(q.tokens, config.heads);
  }
  if (from.near(config.residual ? from.in(0, 1) : 0) != 0) {
    out.residual = from.array<float>(q.tokens, q.dim);
  }
  plan.run(q, w, k, out, from.workspace(plan.workspace_bytes()));

  const auto top_k = static_cast<std::size_t>(config.top_k);
  for (std::size_t i = 0; i < out.indices.size(); ++i) {
    const std::int64_t n = visible(k, i / top_k);
    const bool padding = static_cast<std::int64_t>(i % top_k) >= n;
    if (padding ? out.indices[i] != -1 : out.indices[i] < 0 || out.indices[i] >= n) {
      std::abort();
    }
  }
  if (!out.indices.empty()) {  // otherwise top_k may be too large for this
    compare_with_ragged(context, config, q, w, k);
  }
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  Arguments from(data, size);
  try {
    const Sizes sizes{from.in(0, 4), from.in(1, 6), from.in(0, 1) == 0 ? 64 : 128, from.in(0, 330)};
    const misa::Queries q = make_queries(from, sizes);
    const misa::Weights w = make_weights(from, q);
    if (from.in(0, 1) == 0) {
      run(from, sizes, q, w, make_ragged(from, sizes, q));
    } else {
      run(from, sizes, q, w, make_paged(from, sizes, q));
    }
  } catch (const Skip&) {
    return -1;
  } catch (const misa::Error&) {
  }
  return 0;
}
