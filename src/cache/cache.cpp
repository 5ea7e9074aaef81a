// SPDX-License-Identifier: Apache-2.0
#include "misa/cache.hpp"

#include <algorithm>
#include <cmath>
#include <vector>

#include "cache/cache.hpp"
#include "core/float_mode.hpp"
#include "core/page.hpp"
#include "core/require.hpp"

namespace misa {

std::int64_t validated_page_stride(const CacheView& cache) {
  require(cache.dim == 64 || cache.dim == 128, "cache: expected D = 64 or 128, got {}", cache.dim);
  require(cache.pages >= 0, "cache: expected 0 or more pages, got {}", cache.pages);
  const std::int64_t bytes = page_bytes(cache.dim);
  // With fewer than two pages the stride is never used, so every value is accepted.
  const bool dense = cache.page_stride == 0 || cache.pages < 2;
  const std::int64_t stride = dense ? bytes : cache.page_stride;
  require(stride >= bytes && stride % 4 == 0,
          "cache: expected a page stride of at least {} bytes, a multiple of 4, got {}", bytes,
          stride);
  checked_multiply_add("cache", cache.pages, stride);
  require_data("cache", cache.data, cache.pages, 1);
  require_data("page_sums", cache.page_sums, 0, alignof(float));
  return stride;
}

namespace {

// sum[D] = the sum of the first `tokens` keys of a page. The order of rounding is part of the
// result: scale * element is rounded once, then added, tokens in order.
void sum_page(const std::uint8_t* page, int dim, int tokens, float* sum) {
  const DefaultFloatMode mode;
  std::fill_n(sum, dim, 0.0F);
  for (int i = 0; i < tokens; ++i) {
    const float scale = load_scale(page, dim, i);
    for (int d = 0; d < dim; ++d) {
      sum[d] += scale * e4m3_to_float(page[i * dim + d]);
    }
  }
}

// A validated cache whose pages are accessed by number.
class Pages {
 public:
  explicit Pages(const CacheView& cache) : cache_(cache), stride_(validated_page_stride(cache)) {}
  explicit Pages(const CacheSpan& cache)
      : Pages(CacheView{cache.data, cache.pages, cache.dim, cache.page_stride, cache.page_sums}) {
    writable_ = cache;
  }

  [[nodiscard]] const std::uint8_t* at(std::int64_t page) const {
    return cache_.data + page * stride_;
  }
  [[nodiscard]] std::uint8_t* writable(std::int64_t page) const {
    return writable_.data + page * stride_;
  }
  [[nodiscard]] const float* sum(std::int64_t page) const {
    return cache_.page_sums + page * cache_.dim;
  }
  [[nodiscard]] float* writable_sum(std::int64_t page) const {
    return writable_.page_sums + page * cache_.dim;
  }
  [[nodiscard]] bool has_sums() const { return cache_.page_sums != nullptr; }
  [[nodiscard]] std::int64_t dim() const { return cache_.dim; }

  void update_sum(std::int64_t page, int tokens) const {
    sum_page(at(page), static_cast<int>(dim()), tokens, writable_sum(page));
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
  std::int64_t stride_;
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

// The stride of new keys, in elements.
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

}  // namespace

std::int64_t cache_bytes(std::int64_t pages, std::int64_t dim) {
  require(pages >= 0, "pages: expected 0 or more, got {}", pages);
  require(dim == 64 || dim == 128, "dim: expected 64 or 128, got {}", dim);
  return checked_multiply_add("pages", pages, page_bytes(dim));
}

float quantize(std::span<const float> key, ScaleFormat format, std::span<std::uint8_t> out) {
  const DefaultFloatMode mode;
  require(out.size() == key.size(), "out: expected {} bytes, got {}", key.size(), out.size());
  require(format == ScaleFormat::f32 || format == ScaleFormat::ue8m0,
          "scale format: expected f32 or ue8m0, got {}", static_cast<int>(format));
  constexpr float kMinAmax = 1e-4F;  // so that the scale of an all-zero key is not 0
  float largest = kMinAmax;
  for (const float value : key) {
    largest = std::max(largest, std::abs(value));  // ignores a NaN
  }
  float scale = largest / kE4m3Max;
  if (format == ScaleFormat::ue8m0 && std::isfinite(scale)) {
    int exponent = 0;
    const float mantissa = std::frexp(scale, &exponent);  // in [0.5, 1)
    scale = std::ldexp(1.0F, mantissa == 0.5F ? exponent - 1 : exponent);
  }
  for (std::size_t d = 0; d < key.size(); ++d) {
    out[d] = float_to_e4m3(key[d] / scale);
  }
  return scale;
}

void append(const CacheSpan& cache, const NewKeys& keys, std::span<const std::int64_t> slots,
            ScaleFormat format) {
  const Pages pages(cache);
  const std::int64_t stride = validated_token_stride(keys, cache.dim);
  require(std::ssize(slots) == keys.tokens, "slots: expected {}, one a key, got {}", keys.tokens,
          slots.size());
  const std::vector<std::int64_t> written =
      validated_slots(slots, checked_multiply_add("cache", cache.pages, kPageSize));

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
    std::uint8_t* page = pages.writable(slots[i] / kPageSize);
    const std::int64_t token = slots[i] % kPageSize;
    const float scale = quantize(key, format, {page + token * cache.dim, dim});
    std::memcpy(page + scale_offset(cache.dim, token), &scale, sizeof scale);
  }

  // Recomputed from the bytes, because the old sum may count tokens that are no longer valid (a
  // page was reused, or a speculated token was rolled back).
  for (std::size_t i = 0; pages.has_sums() && i < written.size(); ++i) {
    const std::int64_t page = written[i] / kPageSize;
    if (i + 1 == written.size() || written[i + 1] / kPageSize != page) {
      pages.update_sum(page, static_cast<int>(written[i] % kPageSize) + 1);
    }
  }
}

void copy_pages(const CacheView& source, std::span<const std::int32_t> from,
                const CacheSpan& target, std::span<const std::int32_t> to) {
  const Pages in(source);
  const Pages out(target);
  require(target.dim == source.dim, "target: expected D = {} as the source has, got {}", source.dim,
          target.dim);
  require(to.size() == from.size(), "to: expected {} pages, one a page of from, got {}",
          from.size(), to.size());
  require(!out.has_sums() || in.has_sums(),
          "source: expected page sums, because the target has them, got none");
  in.require_pages("from", from);
  out.require_pages("to", to);
  const auto targets = sorted_distinct<std::int32_t>("to", {to.begin(), to.end()});
  for (std::size_t i = 0; source.data == target.data && i < from.size(); ++i) {
    require(!std::binary_search(targets.begin(), targets.end(), from[i]),
            "from[{}]: expected a page that is not overwritten, got {}, which is also in to", i,
            from[i]);
  }
  for (std::size_t i = 0; i < from.size(); ++i) {
    std::memcpy(out.writable(to[i]), in.at(from[i]),
                static_cast<std::size_t>(page_bytes(source.dim)));
    if (out.has_sums()) {
      std::copy_n(in.sum(from[i]), source.dim, out.writable_sum(to[i]));
    }
  }
}

void rebuild_page_sums(const CacheSpan& cache, std::span<const std::int32_t> pages,
                       std::span<const std::int32_t> filled) {
  const Pages all(cache);
  require(all.has_sums(), "page_sums: expected an array, got null");
  all.require_pages("pages", pages);
  require(filled.empty() || filled.size() == pages.size(),
          "filled: expected none or {}, one a page, got {}", pages.size(), filled.size());
  for (std::size_t i = 0; i < filled.size(); ++i) {
    require(filled[i] >= 0 && filled[i] <= kPageSize, "filled[{}]: expected 0 to {}, got {}", i,
            kPageSize, filled[i]);
  }
  for (std::size_t i = 0; i < pages.size(); ++i) {
    all.update_sum(pages[i], filled.empty() ? kPageSize : filled[i]);
  }
}

void gather(const CacheView& cache, std::span<const std::int32_t> block_table, std::int64_t tokens,
            std::span<std::uint8_t> k, std::span<float> scale) {
  const Pages pages(cache);
  require(tokens >= 0, "tokens: expected 0 or more, got {}", tokens);
  const std::int64_t used = tokens / kPageSize + (tokens % kPageSize != 0 ? 1 : 0);
  require(std::ssize(block_table) >= used, "block_table: expected {} pages for {} tokens, got {}",
          used, tokens, block_table.size());
  pages.require_pages("block_table", block_table.first(static_cast<std::size_t>(used)));
  require(std::ssize(k) == checked_multiply_add("tokens", tokens, cache.dim),
          "k: expected {} * {} bytes, got {}", tokens, cache.dim, k.size());
  require(std::ssize(scale) == tokens, "scale: expected {}, got {}", tokens, scale.size());
  for (std::int64_t i = 0; i < tokens; ++i) {
    const std::uint8_t* page = pages.at(block_table[i / kPageSize]);
    std::copy_n(page + i % kPageSize * cache.dim, cache.dim, k.begin() + i * cache.dim);
    scale[i] = load_scale(page, cache.dim, i % kPageSize);
  }
}

}  // namespace misa
