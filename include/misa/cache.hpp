// SPDX-License-Identifier: Apache-2.0
/// \file
/// Writing and reading the paged key cache, and the page sums beside it.
///
/// Token i of page p has its D e4m3 bytes at p * page_stride + i * D and its fp32 scale at
/// p * page_stride + 64 * D + 4 * i. The layout is the one that vLLM, SGLang, TensorRT-LLM and
/// DeepGEMM share.
#pragma once

#include <cstdint>
#include <span>

#include "misa/view.hpp"

namespace misa {

/// A token's scale: max(amax, 1e-4) / 448 (f32), or that rounded up to a power of two (ue8m0).
enum class ScaleFormat : std::uint8_t { f32, ue8m0 };

/// A writable cache. page_sums [pages, D], if not null, is kept equal to the sum of the dequantised
/// keys of each page, added in order from token 0 to the last one appended.
struct CacheSpan {
  std::uint8_t* data = nullptr;
  std::int64_t pages = 0;
  std::int64_t dim = 0;          ///< D, 64 or 128
  std::int64_t page_stride = 0;  ///< bytes, a multiple of 4; 0: 64 * (D + 4)
  float* page_sums = nullptr;
};

/// Keys k [N, D] in f32 or bf16, to be quantised.
struct NewKeys {
  const void* data = nullptr;
  DType dtype = DType::f32;
  std::int64_t tokens = 0;
  std::int64_t dim = 0;
  std::int64_t token_stride = 0;  ///< elements; 0: dim
};

/// Bytes of a cache without padding: pages * 64 * (dim + 4).
std::int64_t cache_bytes(std::int64_t pages, std::int64_t dim);

/// Quantises one key of D values to e4m3 bytes; returns its scale. A NaN stays NaN; an infinity
/// makes the scale infinite and the key's finite entries zero.
float quantize(std::span<const float> key, ScaleFormat format, std::span<std::uint8_t> out);

/// Quantises keys into slots [N] (page * 64 + offset; -1 skips the token) and recomputes the sums
/// of the touched pages from the cache's bytes. A page's content then ends with the last token
/// appended to it: later tokens left by an earlier user of the page no longer count.
void append(const CacheSpan& cache, const NewKeys& keys, std::span<const std::int64_t> slots,
            ScaleFormat format = ScaleFormat::f32);

/// Copies whole pages: pages of `from` to pages of `to`, sums included (copy-on-write, offload).
void copy_pages(const CacheView& source, std::span<const std::int32_t> from,
                const CacheSpan& target, std::span<const std::int32_t> to);

/// Rebuilds the sums of the given pages from their bytes; filled [N] is how many tokens of each
/// page count (empty: all 64).
void rebuild_page_sums(const CacheSpan& cache, std::span<const std::int32_t> pages,
                       std::span<const std::int32_t> filled = {});

/// Gathers the first `tokens` keys of a sequence out of the pages of its block table into
/// contiguous k [tokens, D] e4m3 and scale [tokens].
void gather(const CacheView& cache, std::span<const std::int32_t> block_table, std::int64_t tokens,
            std::span<std::uint8_t> k, std::span<float> scale);

}  // namespace misa
