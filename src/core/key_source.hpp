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

  // The sum [D] of a group of query t's sequence, its keys 64 * group … 64 * group + 63; null if
  // the source keeps no page sums.
  [[nodiscard]] static const float* page_sum(std::int64_t /*t*/, std::int64_t /*group*/) {
    return nullptr;
  }
};

// Keys in pages of a cache. Query i of the n queries of a sequence sees the sequence's context
// except the last n - 1 - i keys, which belong to the queries after it; or as many keys as its
// entry of row_lens says.
struct PagedSource : PagedKeys {
  [[nodiscard]] KeyFormat format() const { return page_format(); }

  [[nodiscard]] std::int64_t visible(std::int64_t t) const {
    const std::int64_t length =
        row_lens.empty() ? std::int64_t{context_lens[sequence_of(t)]} - (end_of_sequence(t) - 1 - t)
                         : row_lens[t];
    return std::max<std::int64_t>(0, length);
  }

  [[nodiscard]] Sequence sequence_at(std::int64_t t, std::int64_t end) const {
    return {t, std::min(end, end_of_sequence(t)) - t};
  }

  [[nodiscard]] Key key(std::int64_t t, std::int64_t position) const {
    const std::uint8_t* page =
        cache.data + table_of(t)[position >> page_bits(cache.page_size)] * cache.page_stride;
    const std::int64_t slot = position & (cache.page_size - 1);
    return {reinterpret_cast<const std::byte*>(page + slot * format().element_bytes(cache.dim)),
            load_scale(page, cache.dim, cache.page_size, slot)};
  }

  [[nodiscard]] const float* page_sum(std::int64_t t, std::int64_t group) const {
    if (cache.page_sums == nullptr) {
      return nullptr;
    }
    const std::int64_t groups = groups_of(cache.page_size);
    return cache.page_sums + table_of(t)[group / groups] * cache.page_sums_stride +
           group % groups * cache.dim;
  }

  // The number of a key in the cache: page * page_size + its place in the page.
  [[nodiscard]] std::int64_t slot(std::int64_t t, std::int64_t position) const {
    return table_of(t)[position >> page_bits(cache.page_size)] * cache.page_size +
           (position & (cache.page_size - 1));
  }

  // The pages of query t's sequence.
  [[nodiscard]] const std::int32_t* table_of(std::int64_t t) const {
    return block_table + sequence_of(t) * block_table_stride;
  }

  // The number of query t's sequence in the batch.
  [[nodiscard]] std::int64_t sequence_of(std::int64_t t) const {
    return query_starts.empty()
               ? t / next_n
               : std::ranges::upper_bound(query_starts, t) - query_starts.begin() - 1;
  }

 private:
  // The query after the last one of query t's sequence.
  [[nodiscard]] std::int64_t end_of_sequence(std::int64_t t) const {
    const std::int64_t next = sequence_of(t) + 1;
    return query_starts.empty() ? next * next_n : query_starts[next];
  }
};

using KeySource = std::variant<RaggedSource, PagedSource>;

inline KeySource source_of(const RaggedKeys& keys) { return RaggedSource{keys}; }
inline KeySource source_of(const PagedKeys& keys) { return PagedSource{keys}; }

}  // namespace misa
