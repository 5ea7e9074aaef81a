// SPDX-License-Identifier: Apache-2.0
// One validated call, as every backend sees it: strides resolved, contiguous and paged keys alike.
#pragma once

#include <algorithm>
#include <cstdint>
#include <variant>

#include "core/page.hpp"
#include "misa/indexer.hpp"

namespace misa {

// A run of consecutive queries that read the same sequence of keys.
struct Sequence {
  std::int64_t first = 0;    // its first query
  std::int64_t queries = 0;  // how many
};

// One key in memory: D elements and the scale that multiplies them (1 unless e4m3).
struct Key {
  const void* data;
  float scale;
};

struct Problem {
  const IndexerConfig& config;
  Queries q;
  Weights w;
  std::variant<RaggedKeys, PagedKeys> keys;
  Selection out;

  [[nodiscard]] DType k_dtype() const {
    const auto* ragged = std::get_if<RaggedKeys>(&keys);
    return ragged != nullptr ? ragged->dtype : DType::e4m3;
  }

  // n: how many positions query t sees, never negative.
  [[nodiscard]] std::int64_t visible(std::int64_t t) const {
    if (const auto* ragged = std::get_if<RaggedKeys>(&keys)) {
      return std::max<std::int64_t>(0, std::int64_t{ragged->ends[t]} - ragged->starts[t]);
    }
    const auto& paged = std::get<PagedKeys>(keys);
    const std::int64_t n =
        paged.context_lens[t / paged.next_n] - paged.next_n + 1 + t % paged.next_n;
    return std::max<std::int64_t>(0, n);
  }

  // The longest run of queries from t on, at most up to `end`, that share t's keys.
  [[nodiscard]] Sequence sequence_at(std::int64_t t, std::int64_t end) const {
    std::int64_t last = t + 1;
    if (const auto* ragged = std::get_if<RaggedKeys>(&keys)) {
      while (last < end && ragged->starts[last] == ragged->starts[t]) {
        ++last;
      }
    } else {
      const std::int64_t next_n = std::get<PagedKeys>(keys).next_n;
      last = std::min(end, (t / next_n + 1) * next_n);
    }
    return {t, last - t};
  }

  // The physical page that holds positions 64 * page … of query t's sequence; paged keys only.
  [[nodiscard]] std::int64_t physical_page(std::int64_t t, std::int64_t page) const {
    const auto& paged = std::get<PagedKeys>(keys);
    return paged.block_table[(t / paged.next_n) * paged.block_table_stride + page];
  }

  // The key at a position (0 <= position < visible(t)) of query t's sequence.
  [[nodiscard]] Key key(std::int64_t t, std::int64_t position) const {
    if (const auto* ragged = std::get_if<RaggedKeys>(&keys)) {
      const std::int64_t s = ragged->starts[t] + position;
      const auto* base = static_cast<const std::byte*>(ragged->data);
      return {base + s * ragged->token_stride * static_cast<std::int64_t>(size_of(ragged->dtype)),
              ragged->scale != nullptr ? ragged->scale[s] : 1.0F};
    }
    const auto& cache = std::get<PagedKeys>(keys).cache;
    const auto* page = cache.data + physical_page(t, position / kPageSize) * cache.page_stride;
    const std::int64_t slot = position % kPageSize;
    return {page + slot * cache.dim, load_scale(page, cache.dim, slot)};
  }

  // Query head q[t, j].
  [[nodiscard]] const void* query(std::int64_t t, std::int64_t j) const {
    return static_cast<const std::byte*>(q.data) +
           (t * q.token_stride + j * q.head_stride) * static_cast<std::int64_t>(size_of(q.dtype));
  }

  [[nodiscard]] float weight(std::int64_t t, std::int64_t j) const {
    return w.data[t * w.token_stride + j];
  }
};

// Element i of a row of any dtype, unscaled.
inline float element(const void* row, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(row)[i];
    case DType::bf16: return bf16_to_float(static_cast<const std::uint16_t*>(row)[i]);
    case DType::e4m3: return e4m3_to_float(static_cast<const std::uint8_t*>(row)[i]);
  }
  return 0;
}

}  // namespace misa
