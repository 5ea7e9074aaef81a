// SPDX-License-Identifier: Apache-2.0
// A call in device memory, as every CUDA stage gets it. Host code has validated the shapes. The
// contents of the arrays are unknown, so kernels clamp every value that they use as an index.
#pragma once

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <type_traits>

#include "misa/view.hpp"

namespace misa::cuda {

// Bytes that device memory is aligned to, and so every array of a workspace.
inline constexpr std::size_t kDeviceAlignment = 256;

// Ragged keys k [L, D] and the range that each query sees (cuda/key_source.cuh).
struct DeviceRaggedSource {
  const void* data;
  DType dtype;
  std::int64_t tokens;         // L
  std::int64_t stride;         // elements from one key to the next
  const float* scale;          // [L] for e4m3, else null
  const std::int32_t* starts;  // ks [T]
  const std::int32_t* ends;    // ke [T]
  std::int32_t max_keys;       // longer ranges are cut to this many keys
  // A pass computes only queries that see least_keys to most_keys keys after the cut to max_keys.
  // All other queries count as seeing none.
  std::int32_t least_keys = 0;
  std::int32_t most_keys = std::numeric_limits<std::int32_t>::max();
  const std::uint8_t* sketch = nullptr;  // of all keys as one page, if they are scored by it
};

// Tokens of the smallest page of a cache.
inline constexpr int kSmallestPage = 32;

// Keys in pages of a cache. To share their code with ragged keys, kernels number the keys of a
// batch as if every sequence had 2^sequence_bits of them: position p of sequence b has the index (b
// << sequence_bits) + p, which fits in 31 bits.
struct DevicePagedSource {
  const std::uint8_t* data;         // pages, aligned to 16 bytes, of `dim` e4m3 elements a key
  std::int64_t pages;               // of the cache; a key in a page that is not one of them is NaN
  std::int64_t page_stride;         // bytes, a multiple of 16
  std::int32_t dim;                 // D
  std::int32_t page_bits;           // a page has 2^page_bits tokens: 32, 64 or 128
  const std::int32_t* block_table;  // [sequences, max_pages]
  std::int64_t table_stride;        // elements from one row of the table to the next
  std::int32_t max_pages;
  std::int32_t sequences;
  std::int32_t sequence_bits;
  const std::int32_t* context_lens;  // [sequences]; null if there are row_lens
  const std::int32_t* row_lens;      // [T of the call], or null
  const std::int32_t* query_starts;  // [sequences + 1], or null: next_n queries each
  std::int32_t next_n;
  // Of the groups of a page (CacheView), or null; strides are in elements. Aligned to 16 bytes.
  const float* page_sums;
  std::int64_t page_sums_stride;
  const float* largest_scales;  // or null; only with page_sums
  std::int64_t largest_scales_stride;
  const std::uint8_t* sketch;   // [pages] of the configured bits, aligned to 16 bytes; null: to be
                                // computed from the keys
  std::int64_t sketch_stride;   // bytes, a multiple of 16
  std::int32_t first_query;     // of the chunk, among the queries of the call
  std::int32_t max_keys;        // longer rows are cut to this many keys; at most 2^sequence_bits
  std::int32_t least_keys = 0;  // as in DeviceRaggedSource
  std::int32_t most_keys = std::numeric_limits<std::int32_t>::max();

  static constexpr DType dtype = DType::e4m3;
};

// The sequence_bits for sequences of up to max_keys keys, at least a page.
constexpr std::int32_t sequence_bits(std::int64_t max_keys) {
  constexpr std::int64_t kLargestPage = 128;
  const auto last = static_cast<std::uint64_t>(std::max(max_keys, kLargestPage) - 1);
  return static_cast<std::int32_t>(std::bit_width(last));
}

template <class Source>
inline constexpr bool kPaged = std::is_same_v<Source, DevicePagedSource>;

// Whether the cache keeps the sums of its groups.
template <class Source>
constexpr bool has_sums(const Source& keys) {
  if constexpr (kPaged<Source>) {
    return keys.page_sums != nullptr;
  } else {
    return false;
  }
}

// The bounds of the indices of keys.
inline std::int64_t index_bound(const DeviceRaggedSource& keys) { return keys.tokens; }
inline std::int64_t index_bound(const DevicePagedSource& keys) {
  return std::int64_t{keys.sequences} << keys.sequence_bits;
}

// What a plan knows of the keys of its calls.
struct KeyBounds {
  bool paged;
  std::int64_t total;       // indices of keys are below it
  std::size_t table_bytes;  // the most memory that the rows of a block-mean table get
};

// Of ragged calls with at most `total` keys.
inline KeyBounds ragged_bounds(std::int64_t total) {
  return {false, total, std::numeric_limits<std::size_t>::max()};
}

// Of paged calls with at most `batch` sequences of at most max_keys keys. Most of the indices that
// their keys may have are usually not in use, so that block-mean tables get a part of the workspace
// and not a row for every block.
inline KeyBounds paged_bounds(std::int64_t batch, std::int64_t max_keys,
                              std::size_t workspace_cap) {
  return {true, batch << sequence_bits(max_keys), workspace_cap / 4};
}

// Makes query `first` the first one of a source.
inline void advance(DeviceRaggedSource& keys, std::int64_t first) {
  keys.starts += first;
  keys.ends += first;
}
inline void advance(DevicePagedSource& keys, std::int64_t first) {
  keys.first_query += static_cast<std::int32_t>(first);
}

// Queries and weights have actual strides, never default ones. A chunk of a call is a problem whose
// q and w start at the chunk's first query and whose q.tokens is the chunk's.
template <class Source>
struct ProblemOf {
  Queries q;
  Weights w;
  Source k;
};
using Problem = ProblemOf<DeviceRaggedSource>;
using PagedProblem = ProblemOf<DevicePagedSource>;

// Queries first … first + count - 1 of a problem.
template <class Source>
ProblemOf<Source> chunk_of(ProblemOf<Source> problem, std::int64_t first, std::int64_t count) {
  problem.q.data =
      static_cast<const std::byte*>(problem.q.data) +
      first * problem.q.token_stride * static_cast<std::int64_t>(size_of(problem.q.dtype));
  problem.w.data += first * problem.w.token_stride;
  advance(problem.k, first);
  problem.q.tokens = problem.w.tokens = count;
  return problem;
}

// The active heads of each query, and the residual row in place of its other heads.
struct Routing {
  std::int32_t* heads;    // [T, h] ascending; -1 for empty rows
  float* residual;        // [T, D] before rounding; 0 for empty rows; null: no residual row
  std::uint8_t* rounded;  // [T, D] e4m3, where keys are e4m3: residual = rounded * scale
  float* rounded_scale;   // [T]
};

// Whether an entry of Routing::heads is a head of the queries. The list may stand in an output of
// the call, which another output may overlap.
constexpr bool is_head(const Queries& q, std::int32_t head) { return head >= 0 && head < q.heads; }

// Which positions the columns of a matrix of scores stand for: column c is position c; or, with a
// list, position list[t, c / block] * block + c % block of query t.
struct Columns {
  const std::int32_t* list;  // [T, width] ascending, then -1; null: no list
  std::int32_t width;
  std::int32_t block;
};

// Scores [T, columns].
struct Scores {
  float* data;
  std::int64_t columns;
};

// A key and its score, which scoring writes for selection in one 8-byte store.
struct alignas(8) Candidate {
  float score;
  std::uint32_t key;  // its index in the source. Selection converts it to a position (position_in):
                      // in scoring, which lacks a register, that would take 3 % of a step.
};

// The candidates of each query, in lists that are each filled by one thread block: [T, lists,
// capacity] entries and [T, lists] counts. If a count exceeds the capacity, entries were lost.
struct Candidates {
  Candidate* entries;
  std::uint32_t* counts;
  std::uint32_t lists;
  std::uint32_t capacity;
};

}  // namespace misa::cuda
