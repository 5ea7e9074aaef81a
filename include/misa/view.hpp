// SPDX-License-Identifier: Apache-2.0
/// \file
/// Non-owning views of the caller's tensors. Strides are in elements unless their comment says
/// bytes; the innermost dimension is always contiguous.
#pragma once

#include <cstdint>
#include <span>

#include "misa/types.hpp"

namespace misa {

/// Indexer queries q [T, H, D]. For e4m3 their scale is folded into the weights.
struct Queries {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t tokens = 0;        ///< T
  std::int64_t heads = 0;         ///< H, 1 to kMaxHeads
  std::int64_t dim = 0;           ///< D, 64 or 128
  std::int64_t token_stride = 0;  ///< elements from one token to the next; 0: heads * head stride
  std::int64_t head_stride = 0;   ///< elements from one head to the next; 0: dim
};

/// Head weights w [T, H] fp32, any sign, with the softmax scale, H^-1/2 and the query scale folded
/// in.
struct Weights {
  const float* data = nullptr;
  std::int64_t tokens = 0;        ///< T
  std::int64_t heads = 0;         ///< H
  std::int64_t token_stride = 0;  ///< elements from one token to the next; 0: heads
};

/// Contiguous keys k [L, D] of one or more packed sequences: query t sees the keys s with
/// ks[t] <= s < ke[t]. Consecutive queries with equal ks are computed as one sequence, so that they
/// share work; the result does not depend on this.
struct RaggedKeys {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t tokens = 0;               ///< L
  std::int64_t dim = 0;                  ///< D
  std::int64_t token_stride = 0;         ///< elements from one key to the next; 0: dim
  const float* scale = nullptr;          ///< [L], one per token, for e4m3 only
  std::span<const std::int32_t> starts;  ///< ks [T], 0 <= ks <= L
  std::span<const std::int32_t> ends;    ///< ke [T], 0 <= ke <= L; ke <= ks is an empty row
};

/// Means of blocks of keys, in place of the keys. Query t sees the whole blocks whose means are
/// rows starts[t] to ends[t] - 1, in order. If partial[t] is not -1, it also sees a part of the
/// next block, and row partial[t] is the mean of that part.
struct RaggedMeans {
  const float* data = nullptr;            ///< [M, D]
  std::int64_t count = 0;                 ///< M, below 2^30
  std::int64_t dim = 0;                   ///< D
  std::int64_t row_stride = 0;            ///< elements from one mean to the next; 0: dim
  std::span<const std::int32_t> starts;   ///< [T], 0 <= starts <= M
  std::span<const std::int32_t> ends;     ///< [T], 0 <= ends <= M; ends <= starts: no whole block
  std::span<const std::int32_t> partial;  ///< [T], -1 to M - 1; -1 or an empty span: none
};

/// The paged key cache: uint8 [pages, page_size, D + 4], inside a page first page_size x D e4m3
/// bytes, then page_size fp32 scales. Sums and largest scales are those of the page's groups, its
/// aligned runs of 64 tokens. A page of 32 tokens has no groups.
struct CacheView {
  const std::uint8_t* data = nullptr;
  std::int64_t pages = 0;
  std::int64_t dim = 0;  ///< D
  std::int64_t page_stride =
      0;  ///< bytes from one page to the next, a multiple of 4; 0: page_size * (D + 4)
  const float* page_sums =
      nullptr;  ///< [pages, page_size / 64, D] sums of the dequantised keys of each group, or null
  std::int64_t page_size = kPageSize;  ///< tokens of a page: 32, 64 or 128
  /// Elements from the sums of one page to those of the next; 0: page_size / 64 * D.
  std::int64_t page_sums_stride = 0;
  const float* largest_scales =
      nullptr;  ///< [pages, page_size / 64] the largest |scale| of each group; only with page_sums
  /// Elements from the scales of one page to those of the next; 0: page_size / 64.
  std::int64_t largest_scales_stride = 0;
  /// The sketch of each page (docs/formats.md), or null. Only configs with a sketch of as many bits
  /// read it, and score the same with and without it.
  const std::uint8_t* sketch = nullptr;
  int sketch_bits = 0;             ///< of an element: 2 or 4, or 0 without a sketch
  std::int64_t sketch_stride = 0;  ///< bytes from one page's sketch to the next; 0: dense
};

/// Keys of a batch of sequences in a paged cache. By default each sequence has next_n queries: row
/// i of sequence b is query b * next_n + i and sees the first context_lens[b] - next_n + 1 + i
/// keys.
struct PagedKeys {
  CacheView cache;
  const std::int32_t* block_table = nullptr;  ///< [batch, max_pages] page numbers
  std::int64_t max_pages = 0;
  std::int64_t block_table_stride = 0;  ///< elements from one row to the next; 0: max_pages
  /// [batch]; zero or negative is an empty sequence. May be left out if row_lens are given.
  std::span<const std::int32_t> context_lens = {};
  std::int64_t next_n = 1;  ///< queries per sequence; 1 if query_starts are given
  /// [batch + 1], ascending from 0 to T, or empty. In place of next_n: queries query_starts[b] to
  /// query_starts[b + 1] - 1 belong to sequence b, whose last one sees context_lens[b] keys and
  /// each earlier one a key less.
  std::span<const std::int32_t> query_starts = {};
  /// [T] or empty: how many keys each query sees, in place of what context_lens says. The rows of a
  /// sequence may have any lengths, in any order; zero or negative is an empty row.
  std::span<const std::int32_t> row_lens = {};
};

}  // namespace misa
