// SPDX-License-Identifier: Apache-2.0
// Where keys lie in memory, and which of them a query sees. The CPU backend finds keys, their
// scales and page sums only through key() and page_sum() of a source.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <variant>

#include "core/key_format.hpp"
#include "core/page.hpp"
#include "misa/view.hpp"

namespace misa {

// A run of consecutive queries that read the same sequence of keys.
struct Sequence {
  std::int64_t first = 0;    // its first query
  std::int64_t queries = 0;  // how many
};

// One key in memory: D elements and the scale that multiplies them (1 in formats without scales).
struct Key {
  const std::byte* data;
  float scale;
};

// Keys in one array; query t sees keys starts[t] … ends[t] - 1.
struct RaggedSource : RaggedKeys {
  [[nodiscard]] KeyFormat format() const { return format_of(dtype); }

  // n: how many positions query t sees, never negative.
  [[nodiscard]] std::int64_t visible(std::int64_t t) const {
    return std::max<std::int64_t>(0, std::int64_t{ends[t]} - starts[t]);
  }

  // The longest run of queries from t on that share t's sequence and lie before `end`.
  [[nodiscard]] Sequence sequence_at(std::int64_t t, std::int64_t end) const {
    std::int64_t last = t + 1;
    while (last < end && starts[last] == starts[t]) {
      ++last;
    }
    return {t, last - t};
  }

  // The key at a position (0 <= position < visible(t)) of query t's sequence.
  [[nodiscard]] Key key(std::int64_t t, std::int64_t position) const {
    const std::int64_t token = starts[t] + position;
    return {static_cast<const std::byte*>(data) + token * format().element_bytes(token_stride),
            scale != nullptr ? scale[token] : 1.0F};
  }

  // The sum [D] of the 64 keys of a whole page of query t's sequence; null if the source keeps no
  // page sums.
  [[nodiscard]] static const float* page_sum(std::int64_t /*t*/, std::int64_t /*page*/) {
    return nullptr;
  }
};

// Keys in pages of a cache. Query i of the next_n queries of a sequence sees the sequence's context
// except the last next_n - 1 - i keys, which belong to the queries after it.
struct PagedSource : PagedKeys {
  [[nodiscard]] KeyFormat format() const { return kPageFormat; }

  [[nodiscard]] std::int64_t visible(std::int64_t t) const {
    return std::max<std::int64_t>(0, context_lens[t / next_n] - next_n + 1 + t % next_n);
  }

  [[nodiscard]] Sequence sequence_at(std::int64_t t, std::int64_t end) const {
    return {t, std::min(end, (t / next_n + 1) * next_n) - t};
  }

  [[nodiscard]] Key key(std::int64_t t, std::int64_t position) const {
    const std::uint8_t* page =
        cache.data + physical_page(t, position / kPageSize) * cache.page_stride;
    const std::int64_t slot = position % kPageSize;
    return {reinterpret_cast<const std::byte*>(page + slot * format().element_bytes(cache.dim)),
            load_scale(page, cache.dim, slot)};
  }

  [[nodiscard]] const float* page_sum(std::int64_t t, std::int64_t page) const {
    return cache.page_sums == nullptr ? nullptr
                                      : cache.page_sums + physical_page(t, page) * cache.dim;
  }

 private:
  [[nodiscard]] std::int64_t physical_page(std::int64_t t, std::int64_t page) const {
    return block_table[(t / next_n) * block_table_stride + page];
  }
};

using KeySource = std::variant<RaggedSource, PagedSource>;

inline KeySource source_of(const RaggedKeys& keys) { return RaggedSource{keys}; }
inline KeySource source_of(const PagedKeys& keys) { return PagedSource{keys}; }

}  // namespace misa
