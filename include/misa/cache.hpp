// SPDX-License-Identifier: Apache-2.0
/// \file
/// Writing and reading the paged key cache, and the data derived from it.
///
/// Token i of page p has its D e4m3 bytes at p * page_stride + i * D and its fp32 scale at
/// p * page_stride + page_size * D + 4 * i. The layout is the one that vLLM, SGLang, TensorRT-LLM
/// and DeepGEMM share.
#pragma once

#include <cstdint>
#include <span>

#include "misa/view.hpp"

namespace misa {

/// A token's scale: max(amax, 1e-4) / 448 (f32), or that rounded up to a power of two (ue8m0).
enum class ScaleFormat : std::uint8_t { f32, ue8m0 };

/// A writable cache, with the fields of CacheView. page_sums and largest_scales, if not null, are
/// kept equal to the sum of the dequantised keys of each group, added in order from its first token
/// to the last one appended, and to the largest |scale| of these tokens. The sketch, if not null,
/// has every key that was appended.
struct CacheSpan {
  std::uint8_t* data = nullptr;
  std::int64_t pages = 0;
  std::int64_t dim = 0;          ///< D, 64 or 128
  std::int64_t page_stride = 0;  ///< bytes, a multiple of 4; 0: page_size * (D + 4)
  float* page_sums = nullptr;
  std::int64_t page_size = kPageSize;  ///< 32, 64 or 128
  std::int64_t page_sums_stride = 0;
  float* largest_scales = nullptr;
  std::int64_t largest_scales_stride = 0;
  std::uint8_t* sketch = nullptr;
  int sketch_bits = 0;  ///< 0, 2 or 4
  std::int64_t sketch_stride = 0;
};

/// Keys k [N, D] in f32 or bf16, to be quantised.
struct NewKeys {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t tokens = 0;
  std::int64_t dim = 0;
  std::int64_t token_stride = 0;  ///< elements; 0: dim
};

/// Bytes of a cache without padding: pages * page_size * (dim + 4).
std::int64_t cache_bytes(std::int64_t pages, std::int64_t dim, std::int64_t page_size = kPageSize);

/// Where a page that carries its derived data has them, in bytes from its start. Each begins on a
/// multiple of 128; one that the page does not have takes no bytes.
struct PageTail {
  std::int64_t page_sums = 0;       ///< fp32 [page_size / 64, D]
  std::int64_t largest_scales = 0;  ///< fp32 [page_size / 64]
  std::int64_t sketch = 0;          ///< the page's codes, then its scales (docs/formats.md)
  std::int64_t page_stride = 0;     ///< the least page stride, a multiple of 128
};

/// The tail of a page; sketch_bits is 2 or 4, or 0 without a sketch.
PageTail page_tail(std::int64_t dim, std::int64_t page_size = kPageSize, int sketch_bits = 0);

/// The cache with its derived data in the tails of its pages: the page sums, the largest scales
/// and, unless sketch_bits is 0, the sketch. Its page_stride is that of page_tail (also meant by 0)
/// or more, a multiple of 128.
CacheView with_tail(const CacheView& cache);
CacheSpan with_tail(const CacheSpan& cache);

/// Quantises one key of D values to e4m3 bytes; returns its scale. A NaN stays NaN; an infinity
/// makes the scale infinite and the key's finite entries zero.
float quantize(std::span<const float> key, ScaleFormat format, std::span<std::uint8_t> out);

/// Quantises keys into slots [N] (page * page_size + offset; -1 skips the token), writes their
/// sketch and recomputes the sums and largest scales of the touched groups from the cache's bytes.
/// A group's content then ends with the last token appended to it: later tokens left by an earlier
/// user of the page no longer count.
void append(const CacheSpan& cache, const NewKeys& keys, std::span<const std::int64_t> slots,
            ScaleFormat format = ScaleFormat::f32);

/// The same for keys whose bytes and scales an engine has written into the slots: only what is
/// derived from them is written.
void append(const CacheSpan& cache, std::span<const std::int64_t> slots);

/// Copies whole pages: pages of `from` to pages of `to`, with the derived data that the target has
/// (copy-on-write, offload). Both caches have the same page size.
void copy_pages(const CacheView& source, std::span<const std::int32_t> from,
                const CacheSpan& target, std::span<const std::int32_t> to);

/// Rebuilds the derived data of the given pages from their bytes: the sums, the largest scales and
/// the sketch that the cache has. filled [N] is how many tokens of each page count (empty: all);
/// the others get no sketch.
void rebuild(const CacheSpan& cache, std::span<const std::int32_t> pages,
             std::span<const std::int32_t> filled = {});

/// Gathers the first `tokens` keys of a sequence out of the pages of its block table into
/// contiguous k [tokens, D] e4m3 and scale [tokens].
void gather(const CacheView& cache, std::span<const std::int32_t> block_table, std::int64_t tokens,
            std::span<std::uint8_t> k, std::span<float> scale);

}  // namespace misa
