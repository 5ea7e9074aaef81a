// SPDX-License-Identifier: Apache-2.0
// Arrays in device memory of a server that decodes (support/server.hpp).
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "common.hpp"
#include "misa/cache.hpp"
#include "support/server.hpp"

namespace misa::test {

// Elements of an array.
struct Part {
  std::size_t first;
  std::size_t count;
};

template <class T>
std::span<T> part_of(const Guarded<T>& array, Part part, std::size_t width = 1) {
  return array.span().subspan(part.first * width, part.count * width);
}

// The pages of a cache in device memory; all NaN at first. A sketch, of so many bits or 0, stands
// in the pages' tails.
class DeviceCache {
 public:
  DeviceCache(const Server& server, std::int64_t dim, bool tail, int sketch)
      : span_(dense(server, dim, sketch)), tail_(tail), data_(bytes(span_, tail)) {
    span_.data = data_.data();
  }

  [[nodiscard]] CacheSpan span() const { return tail_ ? with_tail(span_) : span_; }
  [[nodiscard]] CacheView view() const {
    CacheView view{span_.data, span_.pages, span_.dim};
    view.page_size = span_.page_size;
    view.sketch_bits = span_.sketch_bits;
    return tail_ ? with_tail(view) : view;
  }

 private:
  static CacheSpan dense(const Server& server, std::int64_t dim, int sketch) {
    CacheSpan span{nullptr, server.pages(), dim};
    span.sketch_bits = sketch;
    span.page_size = server.spec().page_size;
    return span;
  }
  static std::size_t bytes(const CacheSpan& cache, bool tail) {
    return static_cast<std::size_t>(
        tail ? cache.pages * page_tail(cache.dim, cache.page_size, cache.sketch_bits).page_stride
             : cache_bytes(cache.pages, cache.dim, cache.page_size));
  }

  CacheSpan span_;
  bool tail_;
  Guarded<std::uint8_t> data_;
};

// Room for what a number of rows select.
class Outputs {
 public:
  Outputs(const IndexerConfig& config, std::int64_t rows, std::int64_t dim)
      : rows_(rows),
        top_k_(static_cast<std::size_t>(config.top_k)),
        heads_width_(config.router == Router::all ? 0 : static_cast<std::size_t>(config.heads)),
        dim_(config.residual ? static_cast<std::size_t>(dim) : 0),
        indices_(static_cast<std::size_t>(rows) * top_k_),
        scores_(static_cast<std::size_t>(rows) * top_k_),
        heads_(static_cast<std::size_t>(rows) * heads_width_),
        residual_(static_cast<std::size_t>(rows) * dim_) {}

  [[nodiscard]] Selection of(Part rows) const {
    return {part_of(indices_, rows, top_k_), part_of(scores_, rows, top_k_),
            part_of(heads_, rows, heads_width_), part_of(residual_, rows, dim_)};
  }
  [[nodiscard]] Selected read() const {
    return {rows_,           static_cast<std::int64_t>(top_k_),
            indices_.read(), scores_.read(),
            heads_.read(),   residual_.read()};
  }

 private:
  std::int64_t rows_;
  std::size_t top_k_;
  std::size_t heads_width_;
  std::size_t dim_;
  Guarded<std::int32_t> indices_;
  Guarded<float> scores_;
  Guarded<std::int32_t> heads_;
  Guarded<float> residual_;
};

}  // namespace misa::test
