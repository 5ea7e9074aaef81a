// SPDX-License-Identifier: Apache-2.0
#include "misa/cache.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <vector>

#include "cache/cache.hpp"
#include "cache/quantize.hpp"
#include "core/ceil_div.hpp"
#include "core/float_mode.hpp"
#include "core/page.hpp"
#include "core/require.hpp"
#include "core/sketch.hpp"

namespace misa {
namespace {

bool is_dim(std::int64_t dim) { return dim == 64 || dim == 128; }

bool is_page_size(std::int64_t tokens) { return tokens == 32 || tokens == 64 || tokens == 128; }

// The arguments of calls that have no cache.
void validate_sizes(std::int64_t dim, std::int64_t page_size) {
  require(is_dim(dim), "dim: expected 64 or 128, got {}", dim);
  require(is_page_size(page_size), "page_size: expected 32, 64 or 128, got {}", page_size);
}

// The stride of an array beside the cache with `least` elements a page, where 0 means dense.
template <class T>
std::int64_t validated_stride(std::string_view name, const CacheView& cache, const T* data,
                              std::int64_t least, std::int64_t stride) {
  require(data == nullptr || least > 0, "{}: expected none for pages of {} tokens, got an array",
          name, cache.page_size);
  require_data(name, data, 0, alignof(T));
  if (data == nullptr || stride == 0 || cache.pages < 2) {
    return least;
  }
  require(stride >= least, "{}: expected a page stride of at least {}, got {}", name, least,
          stride);
  const std::int64_t elements = checked_multiply_add(name, cache.pages, stride);
  checked_multiply_add(name, elements, sizeof(T));
  return stride;
}

void validate_sketch_bits(int bits) {
  require(bits == 0 || bits == 2 || bits == 4, "sketch_bits: expected 0 (none), 2 or 4, got {}",
          bits);
}

// Bytes of the sketch of a page; 0 without one.
std::int64_t sketch_bytes_of(int bits, std::int64_t dim, std::int64_t page_size) {
  return bits == 0 ? 0 : sketch_page_bytes(bits, dim, page_size);
}

}  // namespace

CacheView validated(const CacheView& cache) {
  require(is_dim(cache.dim), "cache: expected D = 64 or 128, got {}", cache.dim);
  require(is_page_size(cache.page_size), "cache: expected a page size of 32, 64 or 128, got {}",
          cache.page_size);
  require(cache.pages >= 0, "cache: expected 0 or more pages, got {}", cache.pages);
  const std::int64_t bytes = page_bytes(cache.dim, cache.page_size);
  // With fewer than two pages the stride is never used, so every value is accepted.
  const bool dense = cache.page_stride == 0 || cache.pages < 2;
  CacheView resolved = cache;
  resolved.page_stride = dense ? bytes : cache.page_stride;
  require(resolved.page_stride >= bytes && resolved.page_stride % 4 == 0,
          "cache: expected a page stride of at least {} bytes, a multiple of 4, got {}", bytes,
          resolved.page_stride);
  checked_multiply_add("cache", cache.pages, resolved.page_stride);
  require_data("cache", cache.data, cache.pages, 1);
  const std::int64_t groups = groups_of(cache.page_size);
  resolved.page_sums_stride = validated_stride("page_sums", cache, cache.page_sums,
                                               groups * cache.dim, cache.page_sums_stride);
  resolved.largest_scales_stride = validated_stride("largest_scales", cache, cache.largest_scales,
                                                    groups, cache.largest_scales_stride);
  require(cache.largest_scales == nullptr || cache.page_sums != nullptr,
          "largest_scales: expected none without page_sums, got an array");
  validate_sketch_bits(cache.sketch_bits);
  require(cache.sketch == nullptr || cache.sketch_bits != 0,
          "sketch_bits: expected 2 or 4, as there is a sketch, got 0");
  require_data("sketch", cache.sketch, cache.sketch_bits == 0 ? 0 : cache.pages, 1);
  resolved.sketch_stride = 0;
  if (cache.sketch != nullptr) {
    resolved.sketch_stride = validated_stride(
        "sketch", cache, cache.sketch,
        sketch_page_bytes(cache.sketch_bits, cache.dim, cache.page_size), cache.sketch_stride);
  }
  return resolved;
}

void require_device_sketch(const CacheView& cache) {
  constexpr std::int64_t kAlignment = 16;  // dense sketches of pages have multiples of it
  require_data("sketch", cache.sketch, 0, kAlignment);
  require(cache.sketch_stride % kAlignment == 0,
          "sketch: expected a page stride of a multiple of {} bytes, got {}", kAlignment,
          cache.sketch_stride);
}

CacheView view_of(const CacheSpan& cache) {
  return {cache.data,
          cache.pages,
          cache.dim,
          cache.page_stride,
          cache.page_sums,
          cache.page_size,
          cache.page_sums_stride,
          cache.largest_scales,
          cache.largest_scales_stride,
          cache.sketch,
          cache.sketch_bits,
          cache.sketch_stride};
}

std::int64_t validated_token_stride(const NewKeys& k, std::int64_t dim) {
  require(k.dtype == DType::f32 || k.dtype == DType::bf16, "k: expected f32 or bf16, got dtype {}",
          static_cast<int>(k.dtype));
  require(k.dim == dim, "k: expected D = {} as the cache has, got {}", dim, k.dim);
  require(k.tokens >= 0, "k: expected 0 or more tokens, got {}", k.tokens);
  const std::int64_t stride = k.token_stride == 0 || k.tokens < 2 ? dim : k.token_stride;
  require(stride >= dim, "k: expected a token stride of at least {}, got {}", dim, stride);
  const std::int64_t size = static_cast<std::int64_t>(size_of(k.dtype));
  checked_multiply_add("k", checked_multiply_add("k", k.tokens, stride), size);
  require_data("k", k.data, k.tokens, size_of(k.dtype));
  return stride;
}

void validate_copy(const CacheView& source, const CacheView& target, std::size_t from,
                   std::size_t to) {
  require(target.dim == source.dim, "target: expected D = {} as the source has, got {}", source.dim,
          target.dim);
  require(target.page_size == source.page_size,
          "target: expected a page size of {} as the source has, got {}", source.page_size,
          target.page_size);
  require(to == from, "to: expected {} pages, one a page of from, got {}", from, to);
  require(target.page_sums == nullptr || source.page_sums != nullptr,
          "source: expected page sums, because the target has them, got none");
  require(target.largest_scales == nullptr || source.largest_scales != nullptr,
          "source: expected largest scales, because the target has them, got none");
  require(target.sketch == nullptr ||
              (source.sketch != nullptr && source.sketch_bits == target.sketch_bits),
          "source: expected a sketch of {} bits, because the target has one, got {}",
          target.sketch_bits, source.sketch == nullptr ? 0 : source.sketch_bits);
}

void validate(ScaleFormat format) {
  require(format == ScaleFormat::f32 || format == ScaleFormat::ue8m0,
          "scale format: expected f32 or ue8m0, got {}", static_cast<int>(format));
}

namespace {

// A validated cache whose pages are accessed by number. Groups are numbered through all pages.
class Pages {
 public:
  explicit Pages(const CacheView& cache)
      : cache_(validated(cache)), groups_(groups_of(cache.page_size)) {}
  explicit Pages(const CacheSpan& cache) : Pages(view_of(cache)) { writable_ = cache; }

  [[nodiscard]] const CacheView& view() const { return cache_; }
  [[nodiscard]] std::int64_t groups() const { return groups_; }
  [[nodiscard]] std::int64_t slots() const { return cache_.pages * cache_.page_size; }

  [[nodiscard]] const std::uint8_t* at(std::int64_t page) const {
    return cache_.data + page * cache_.page_stride;
  }
  [[nodiscard]] std::uint8_t* writable(std::int64_t page) const {
    return writable_.data + page * cache_.page_stride;
  }
  [[nodiscard]] float scale(std::int64_t page, std::int64_t token) const {
    return load_scale(at(page), cache_.dim, cache_.page_size, token);
  }
  [[nodiscard]] bool has_sums() const { return cache_.page_sums != nullptr; }
  [[nodiscard]] bool has_sketch() const { return cache_.sketch != nullptr; }

  // Recomputes the sum and the largest scale of the first `tokens` tokens of a group. The order of
  // rounding is part of the result: scale * element is rounded once, then added, tokens in order.
  void update_group(std::int64_t group, std::int64_t tokens) const {
    const DefaultFloatMode mode;
    const std::int64_t page = group / groups_;
    const std::int64_t first = group % groups_ * kGroupSize;
    float* sum =
        writable_.page_sums + page * cache_.page_sums_stride + group % groups_ * cache_.dim;
    std::fill_n(sum, cache_.dim, 0.0F);
    std::uint32_t largest = 0;  // bits, so that a NaN counts as the largest
    for (std::int64_t i = first; i < first + tokens; ++i) {
      const float factor = scale(page, i);
      largest = std::max(largest, std::bit_cast<std::uint32_t>(std::abs(factor)));
      for (std::int64_t d = 0; d < cache_.dim; ++d) {
        sum[d] += factor * e4m3_to_float(at(page)[i * cache_.dim + d]);
      }
    }
    if (writable_.largest_scales != nullptr) {
      writable_.largest_scales[page * cache_.largest_scales_stride + group % groups_] =
          std::bit_cast<float>(largest);
    }
  }

  // Writes the sketch of a token from its bytes.
  void update_sketch(std::int64_t slot) const {
    const DefaultFloatMode mode;
    const std::int64_t page = slot / cache_.page_size;
    const std::int64_t token = slot % cache_.page_size;
    const int bits = cache_.sketch_bits;
    std::uint8_t* sketch = writable_.sketch + page * cache_.sketch_stride;
    encode_sketch(bits, at(page) + token * cache_.dim, scale(page, token), cache_.dim,
                  sketch + sketch_code_offset(bits, cache_.dim, token),
                  sketch + sketch_scale_offset(bits, cache_.dim, cache_.page_size, token));
  }

  void copy_page(const Pages& from, std::int64_t source, std::int64_t target) const {
    std::memcpy(writable(target), from.at(source),
                static_cast<std::size_t>(page_bytes(cache_.dim, cache_.page_size)));
    if (writable_.page_sums != nullptr) {
      std::copy_n(from.cache_.page_sums + source * from.cache_.page_sums_stride,
                  groups_ * cache_.dim, writable_.page_sums + target * cache_.page_sums_stride);
    }
    if (writable_.largest_scales != nullptr) {
      std::copy_n(from.cache_.largest_scales + source * from.cache_.largest_scales_stride, groups_,
                  writable_.largest_scales + target * cache_.largest_scales_stride);
    }
    if (writable_.sketch != nullptr) {
      std::copy_n(from.cache_.sketch + source * from.cache_.sketch_stride,
                  sketch_page_bytes(cache_.sketch_bits, cache_.dim, cache_.page_size),
                  writable_.sketch + target * cache_.sketch_stride);
    }
  }

  // Refuses page numbers outside of the cache.
  void require_pages(std::string_view name, std::span<const std::int32_t> pages) const {
    for (std::size_t i = 0; i < pages.size(); ++i) {
      require(pages[i] >= 0 && pages[i] < cache_.pages,
              "{}[{}]: expected a page from 0 to {}, got {}", name, i, cache_.pages - 1, pages[i]);
    }
  }

 private:
  CacheView cache_;
  std::int64_t groups_;
  CacheSpan writable_;
};

// Sorts the values; a repeated value is an error.
template <class T>
std::vector<T> sorted_distinct(std::string_view name, std::vector<T> values) {
  std::sort(values.begin(), values.end());
  const auto repeated = std::adjacent_find(values.begin(), values.end());
  require(repeated == values.end(), "{}: expected each at most once, got {} twice", name,
          repeated == values.end() ? T{} : *repeated);
  return values;
}

// The slots that are written, ascending.
std::vector<std::int64_t> validated_slots(std::span<const std::int64_t> slots, std::int64_t end) {
  std::vector<std::int64_t> written;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    require(slots[i] >= -1 && slots[i] < end, "slots[{}]: expected -1 to {}, got {}", i, end - 1,
            slots[i]);
    if (slots[i] >= 0) {
      written.push_back(slots[i]);
    }
  }
  return sorted_distinct("slots", std::move(written));
}

// Recomputes what is derived from these slots, ascending, and from their groups. The old sum cannot
// be added to: it may count tokens that are no longer valid (a page was reused, or a speculated
// token was rolled back).
void update_derived(const Pages& pages, const std::vector<std::int64_t>& written) {
  for (std::size_t i = 0; pages.has_sketch() && i < written.size(); ++i) {
    pages.update_sketch(written[i]);
  }
  for (std::size_t i = 0; pages.has_sums() && i < written.size(); ++i) {
    const std::int64_t group = written[i] / kGroupSize;
    if (i + 1 == written.size() || written[i + 1] / kGroupSize != group) {
      pages.update_group(group, written[i] % kGroupSize + 1);
    }
  }
}

}  // namespace

std::int64_t cache_bytes(std::int64_t pages, std::int64_t dim, std::int64_t page_size) {
  require(pages >= 0, "pages: expected 0 or more, got {}", pages);
  validate_sizes(dim, page_size);
  return checked_multiply_add("pages", pages, page_bytes(dim, page_size));
}

PageTail page_tail(std::int64_t dim, std::int64_t page_size, int sketch_bits) {
  constexpr std::int64_t kAlignment = 128;
  validate_sizes(dim, page_size);
  validate_sketch_bits(sketch_bits);
  const auto aligned = [](std::int64_t bytes) { return ceil_div(bytes, kAlignment) * kAlignment; };
  const std::int64_t groups = groups_of(page_size);
  constexpr std::int64_t kFloat = sizeof(float);
  PageTail tail;
  tail.page_sums = aligned(page_bytes(dim, page_size));
  tail.largest_scales = tail.page_sums + aligned(groups * dim * kFloat);
  tail.sketch = tail.largest_scales + aligned(groups * kFloat);
  tail.page_stride = tail.sketch + aligned(sketch_bytes_of(sketch_bits, dim, page_size));
  return tail;
}

namespace {

template <class Cache>
Cache cache_with_tail(Cache cache) {
  const PageTail tail = page_tail(cache.dim, cache.page_size, cache.sketch_bits);
  if (cache.page_stride == 0) {
    cache.page_stride = tail.page_stride;
  }
  require(cache.page_stride >= tail.page_stride && cache.page_stride % 128 == 0,
          "cache: expected a page stride of at least {} bytes, a multiple of 128, got {}",
          tail.page_stride, cache.page_stride);
  if (cache.data != nullptr && groups_of(cache.page_size) > 0) {
    using Float = decltype(cache.page_sums);
    cache.page_sums = reinterpret_cast<Float>(cache.data + tail.page_sums);
    cache.largest_scales = reinterpret_cast<Float>(cache.data + tail.largest_scales);
    cache.page_sums_stride = cache.largest_scales_stride =
        cache.page_stride / static_cast<std::int64_t>(sizeof(float));
  }
  if (cache.data != nullptr && cache.sketch_bits != 0) {
    cache.sketch = cache.data + tail.sketch;
    cache.sketch_stride = cache.page_stride;
  }
  return cache;
}

}  // namespace

CacheView with_tail(const CacheView& cache) { return cache_with_tail(cache); }
CacheSpan with_tail(const CacheSpan& cache) { return cache_with_tail(cache); }

float quantize(std::span<const float> key, ScaleFormat format, std::span<std::uint8_t> out) {
  const DefaultFloatMode mode;
  require(out.size() == key.size(), "out: expected {} bytes, got {}", key.size(), out.size());
  validate(format);
  float largest = 0;
  for (const float value : key) {
    largest = std::max(largest, std::abs(value));  // ignores a NaN
  }
  const float scale = quantized_scale(largest, format);
  for (std::size_t d = 0; d < key.size(); ++d) {
    out[d] = quantized_element(key[d], scale);
  }
  return scale;
}

void append(const CacheSpan& cache, const NewKeys& keys, std::span<const std::int64_t> slots,
            ScaleFormat format) {
  const Pages pages(cache);
  const std::int64_t stride = validated_token_stride(keys, cache.dim);
  require(std::ssize(slots) == keys.tokens, "slots: expected {}, one a key, got {}", keys.tokens,
          slots.size());
  const std::vector<std::int64_t> written = validated_slots(slots, pages.slots());

  const auto dim = static_cast<std::size_t>(cache.dim);
  std::vector<float> key(dim);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] < 0) {
      continue;
    }
    const std::int64_t first = static_cast<std::int64_t>(i) * stride;
    if (keys.dtype == DType::f32) {
      std::copy_n(static_cast<const float*>(keys.data) + first, dim, key.begin());
    } else {
      std::transform(static_cast<const std::uint16_t*>(keys.data) + first,
                     static_cast<const std::uint16_t*>(keys.data) + first + dim, key.begin(),
                     bf16_to_float);
    }
    std::uint8_t* page = pages.writable(slots[i] / cache.page_size);
    const std::int64_t token = slots[i] % cache.page_size;
    const float scale = quantize(key, format, {page + token * cache.dim, dim});
    std::memcpy(page + scale_offset(cache.dim, cache.page_size, token), &scale, sizeof scale);
  }

  update_derived(pages, written);
}

void append(const CacheSpan& cache, std::span<const std::int64_t> slots) {
  const Pages pages(cache);
  update_derived(pages, validated_slots(slots, pages.slots()));
}

void copy_pages(const CacheView& source, std::span<const std::int32_t> from,
                const CacheSpan& target, std::span<const std::int32_t> to) {
  const Pages in(source);
  const Pages out(target);
  validate_copy(in.view(), out.view(), from.size(), to.size());
  in.require_pages("from", from);
  out.require_pages("to", to);
  const auto targets = sorted_distinct<std::int32_t>("to", {to.begin(), to.end()});
  for (std::size_t i = 0; source.data == target.data && i < from.size(); ++i) {
    require(!std::binary_search(targets.begin(), targets.end(), from[i]),
            "from[{}]: expected a page that is not overwritten, got {}, which is also in to", i,
            from[i]);
  }
  for (std::size_t i = 0; i < from.size(); ++i) {
    out.copy_page(in, from[i], to[i]);
  }
}

void rebuild(const CacheSpan& cache, std::span<const std::int32_t> pages,
             std::span<const std::int32_t> filled) {
  const Pages all(cache);
  require(all.has_sums() || all.has_sketch(),
          "page_sums: expected an array, or a sketch, got null");
  all.require_pages("pages", pages);
  require(filled.empty() || filled.size() == pages.size(),
          "filled: expected none or {}, one a page, got {}", pages.size(), filled.size());
  for (std::size_t i = 0; i < filled.size(); ++i) {
    require(filled[i] >= 0 && filled[i] <= cache.page_size, "filled[{}]: expected 0 to {}, got {}",
            i, cache.page_size, filled[i]);
  }
  for (std::size_t i = 0; i < pages.size(); ++i) {
    const std::int64_t tokens = filled.empty() ? cache.page_size : filled[i];
    for (std::int64_t token = 0; all.has_sketch() && token < tokens; ++token) {
      all.update_sketch(pages[i] * cache.page_size + token);
    }
    for (std::int64_t group = 0; all.has_sums() && group < all.groups(); ++group) {
      all.update_group(pages[i] * all.groups() + group,
                       std::clamp<std::int64_t>(tokens - group * kGroupSize, 0, kGroupSize));
    }
  }
}

void gather(const CacheView& cache, std::span<const std::int32_t> block_table, std::int64_t tokens,
            std::span<std::uint8_t> k, std::span<float> scale) {
  const Pages pages(cache);
  require(tokens >= 0, "tokens: expected 0 or more, got {}", tokens);
  const std::int64_t used = tokens / cache.page_size + (tokens % cache.page_size != 0 ? 1 : 0);
  require(std::ssize(block_table) >= used, "block_table: expected {} pages for {} tokens, got {}",
          used, tokens, block_table.size());
  pages.require_pages("block_table", block_table.first(static_cast<std::size_t>(used)));
  require(std::ssize(k) == checked_multiply_add("tokens", tokens, cache.dim),
          "k: expected {} * {} bytes, got {}", tokens, cache.dim, k.size());
  require(std::ssize(scale) == tokens, "scale: expected {}, got {}", tokens, scale.size());
  for (std::int64_t i = 0; i < tokens; ++i) {
    const std::int64_t page = block_table[i / cache.page_size];
    const std::int64_t token = i % cache.page_size;
    std::copy_n(pages.at(page) + token * cache.dim, cache.dim, k.begin() + i * cache.dim);
    scale[i] = pages.scale(page, token);
  }
}

}  // namespace misa
