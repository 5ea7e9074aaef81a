// SPDX-License-Identifier: Apache-2.0
// The calls that write a paged key cache in device memory. Only what does not need a read of device
// memory is checked.
#include <limits>

#include "cache/cache.hpp"
#include "cache/generic.hpp"
#include "core/require.hpp"
#include "misa/cuda.hpp"

namespace misa::cuda {
namespace {

// Kernels read and write scales as words.
constexpr std::size_t kCacheAlignment = alignof(float);

// The cache with its actual strides.
template <class Cache>
Cache validated_on_device(const Cache& cache, const CacheView& view) {
  const CacheView resolved = validated(view);
  require_data("cache", cache.data, 0, kCacheAlignment);
  require_device_sketch(resolved);
  Cache strided = cache;
  strided.page_stride = resolved.page_stride;
  strided.page_sums_stride = resolved.page_sums_stride;
  strided.largest_scales_stride = resolved.largest_scales_stride;
  strided.sketch_stride = resolved.sketch_stride;
  return strided;
}
CacheView validated_on_device(const CacheView& cache) { return validated_on_device(cache, cache); }
CacheSpan validated_on_device(const CacheSpan& cache) {
  return validated_on_device(cache, view_of(cache));
}

// Each entry has a thread block.
template <class T>
void validate_list(std::string_view name, std::span<const T> list) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  require(std::ssize(list) <= kMost, "{}: expected at most {} entries, got {}", name, kMost,
          list.size());
  require_data(name, list.data(), std::ssize(list), alignof(T));
}

}  // namespace

void append(const CacheSpan& cache, const NewKeys& keys, std::span<const std::int64_t> slots,
            void* stream, ScaleFormat format) {
  const CacheSpan there = validated_on_device(cache);
  NewKeys k = keys;
  k.token_stride = validated_token_stride(keys, cache.dim);
  validate_list("slots", slots);
  require(std::ssize(slots) == keys.tokens, "slots: expected {}, one a key, got {}", keys.tokens,
          slots.size());
  validate(format);
  if (!slots.empty()) {
    cuda::cache::launch_append(there, k, slots.data(), format, stream);
  }
}

void append(const CacheSpan& cache, std::span<const std::int64_t> slots, void* stream) {
  const CacheSpan there = validated_on_device(cache);
  validate_list("slots", slots);
  if (!slots.empty() && (there.page_sums != nullptr || there.sketch != nullptr)) {
    const NewKeys written{nullptr, DType::e4m3, std::ssize(slots), cache.dim};
    cuda::cache::launch_append(there, written, slots.data(), ScaleFormat::f32, stream);
  }
}

void copy_pages(const CacheView& source, std::span<const std::int32_t> from,
                const CacheSpan& target, std::span<const std::int32_t> to, void* stream) {
  const CacheView in = validated_on_device(source);
  const CacheSpan out = validated_on_device(target);
  validate_copy(in, view_of(out), from.size(), to.size());
  validate_list("from", from);
  validate_list("to", to);
  if (!from.empty()) {
    cuda::cache::launch_copy(in, from.data(), out, to.data(), std::ssize(from), stream);
  }
}

void rebuild(const CacheSpan& cache, std::span<const std::int32_t> pages,
             std::span<const std::int32_t> filled, void* stream) {
  const CacheSpan there = validated_on_device(cache);
  require(cache.page_sums != nullptr || cache.sketch != nullptr,
          "page_sums: expected an array, or a sketch, got null");
  validate_list("pages", pages);
  require(filled.empty() || filled.size() == pages.size(),
          "filled: expected none or {}, one a page, got {}", pages.size(), filled.size());
  require_data("filled", filled.data(), 0, alignof(std::int32_t));
  if (!pages.empty()) {
    cuda::cache::launch_rebuild(there, pages.data(), filled.empty() ? nullptr : filled.data(),
                                std::ssize(pages), stream);
  }
}

}  // namespace misa::cuda
