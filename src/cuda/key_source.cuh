// SPDX-License-Identifier: Apache-2.0
// Where a key lies and which keys a query sees. Loaders take the source as a template parameter.
// Ranges are clamped, so that reads stay in bounds whatever the arrays hold. The index of a key in
// a source grows by one from a key of a sequence to the next.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/sketch.hpp"
#include "cuda/problem.hpp"
#include "cuda/sketch.cuh"

namespace misa::cuda {

// The keys that a query sees, of all keys of the source.
struct Range {
  std::int32_t start;   // 0 <= start, start + length <= L
  std::int32_t length;  // n >= 0
};

__device__ inline Range visible(const DeviceRaggedSource& keys, std::int64_t t) {
  const auto tokens = static_cast<std::int32_t>(keys.tokens);
  const std::int32_t start = min(max(keys.starts[t], 0), tokens);
  const std::int32_t end = min(max(keys.ends[t], start), tokens);
  const std::int32_t length = min(end - start, keys.max_keys);
  return {start, length < keys.least_keys || length > keys.most_keys ? 0 : length};
}

// The position, among the keys that a query sees, of the key with index `token` in the source;
// modulo 2^32 for keys that it does not see.
__device__ inline std::uint32_t position_in(const Range& range, std::uint32_t token) {
  return token - range.start;
}

// Bytes from one key of a sequence to the next one.
template <DType type>
__device__ inline std::int64_t key_pitch(const DeviceRaggedSource& keys) {
  return keys.stride * static_cast<std::int64_t>(size_of(type));
}

// The elements of a key, aligned to 16 bytes.
template <DType type>
__device__ inline const std::byte* key_address(const DeviceRaggedSource& keys, std::int64_t token) {
  return static_cast<const std::byte*>(keys.data) + token * key_pitch<type>(keys);
}

// The scale of a key; 1 in formats without scales.
template <DType type>
__device__ inline float key_scale(const DeviceRaggedSource& keys, std::int64_t token) {
  return type == DType::e4m3 ? __ldg(keys.scale + token) : 1.0F;
}

// Whether a key's format has scales, where the dtype is known at run time only.
__device__ inline bool has_scales(const DeviceRaggedSource& keys) { return keys.scale != nullptr; }

// Paged keys.

// Queries first … end - 1.
struct QueryRange {
  std::int64_t first;
  std::int64_t end;
};

// The queries of a sequence, of those of the call.
__device__ inline QueryRange queries_of(const DevicePagedSource& keys, std::int32_t sequence) {
  if (keys.query_starts != nullptr) {
    return {keys.query_starts[sequence], keys.query_starts[sequence + 1]};
  }
  const std::int64_t first = std::int64_t{sequence} * keys.next_n;
  return {first, first + keys.next_n};
}

// The sequence of a query of the chunk.
__device__ inline std::int32_t sequence_of(const DevicePagedSource& keys, std::int64_t t) {
  const auto query = keys.first_query + static_cast<std::int32_t>(t);
  if (keys.query_starts == nullptr) {
    return query / keys.next_n;
  }
  std::int32_t sequence = 0;  // the last one that starts at the query or before it
  for (std::int32_t end = keys.sequences; end - sequence > 1;) {
    const std::int32_t middle = sequence + (end - sequence) / 2;
    (keys.query_starts[middle] <= query ? sequence : end) = middle;
  }
  return sequence;
}

// The most keys that the block table and max_keys let a query see.
__host__ __device__ inline std::int32_t row_limit(const DevicePagedSource& keys) {
  const std::int64_t room = std::int64_t{keys.max_pages} << keys.page_bits;
  return room < keys.max_keys ? static_cast<std::int32_t>(room) : keys.max_keys;
}

// How many keys a query of a sequence sees, least_keys and most_keys aside. `queries` are the
// sequence's; the query is counted as they are, from the first one of the call.
__device__ inline std::int32_t row_length(const DevicePagedSource& keys, std::int32_t sequence,
                                          const QueryRange& queries, std::int64_t query) {
  const std::int64_t length = keys.row_lens != nullptr
                                  ? keys.row_lens[query]
                                  : keys.context_lens[sequence] - (queries.end - 1 - query);
  const auto limit = std::int64_t{keys.pages > 0 ? row_limit(keys) : 0};
  return static_cast<std::int32_t>(max(std::int64_t{0}, min(length, limit)));
}

// A query that query_starts gives to no sequence sees nothing.
__device__ inline Range visible(const DevicePagedSource& keys, std::int64_t t) {
  const auto query = keys.first_query + static_cast<std::int32_t>(t);
  const std::int32_t sequence = sequence_of(keys, t);
  const QueryRange queries = queries_of(keys, sequence);
  const bool exists = queries.first <= query && query < queries.end;
  const std::int32_t length = exists ? row_length(keys, sequence, queries, query) : 0;
  const bool computed = length >= keys.least_keys && length <= keys.most_keys;
  return {sequence << keys.sequence_bits, computed ? length : 0};
}

// As many keys as the chunk's `tokens` queries of a sequence see at most, least_keys and most_keys
// aside.
__device__ inline std::int32_t longest_row(const DevicePagedSource& keys, std::int64_t tokens,
                                           std::int32_t sequence) {
  const QueryRange queries = queries_of(keys, sequence);
  const std::int64_t end = min(queries.end, keys.first_query + tokens);
  std::int64_t query = max(queries.first, std::int64_t{keys.first_query});
  if (keys.row_lens == nullptr) {
    query = max(query, end - 1);  // the last one sees the most
  }
  std::int32_t longest = 0;
  for (; query < end; ++query) {
    longest = max(longest, row_length(keys, sequence, queries, query));
  }
  return longest;
}

// A NaN, positive: of a key without a page.
inline constexpr std::uint32_t kNaNBits = 0x7FFFFFFF;

// The page of a key that some query sees; -1 if the block table names a page that does not exist.
__device__ inline std::int64_t page_of(const DevicePagedSource& keys, std::int64_t token) {
  const std::int64_t sequence = token >> keys.sequence_bits;
  const std::int64_t position = token & ((std::int64_t{1} << keys.sequence_bits) - 1);
  const std::int32_t page =
      __ldg(keys.block_table + sequence * keys.table_stride + (position >> keys.page_bits));
  return page >= 0 && page < keys.pages ? page : -1;
}

// The place of a key in its page.
__device__ inline std::int64_t slot_of(const DevicePagedSource& keys, std::int64_t token) {
  return token & ((1 << keys.page_bits) - 1);
}

// The scales of a page.
__device__ inline const float* page_scales(const DevicePagedSource& keys, std::int64_t page) {
  const std::int64_t elements = std::int64_t{keys.dim} << keys.page_bits;
  return reinterpret_cast<const float*>(keys.data + page * keys.page_stride + elements);
}

template <DType type>
__device__ inline const std::byte* key_address(const DevicePagedSource& keys, std::int64_t token) {
  return reinterpret_cast<const std::byte*>(keys.data) +
         max(page_of(keys, token), std::int64_t{0}) * keys.page_stride +
         slot_of(keys, token) * keys.dim;
}

template <DType type>
__device__ inline float key_scale(const DevicePagedSource& keys, std::int64_t token) {
  const std::int64_t page = page_of(keys, token);
  return page < 0 ? __uint_as_float(kNaNBits)
                  : __ldg(page_scales(keys, page) + slot_of(keys, token));
}

// Whether sketches of keys stand in memory.
__device__ inline bool has_sketch(const DeviceRaggedSource& keys) { return keys.sketch != nullptr; }
__device__ inline bool has_sketch(const DevicePagedSource& keys) { return keys.sketch != nullptr; }

// The sketch of a key of a source that has_sketch; null if the key's page does not exist.
__device__ inline SketchBytes sketch_of(const DeviceRaggedSource& keys, int sketch, int dim,
                                        std::int64_t token) {
  return {keys.sketch + sketch_code_offset(sketch, dim, token),
          keys.sketch + sketch_scale_offset(sketch, dim, keys.tokens, token)};
}
__device__ inline SketchBytes sketch_of(const DevicePagedSource& keys, int sketch, int dim,
                                        std::int64_t token) {
  const std::int64_t page = page_of(keys, token);
  if (page < 0) {
    return {nullptr, nullptr};
  }
  const std::uint8_t* const bytes = keys.sketch + page * keys.sketch_stride;
  const std::int64_t slot = slot_of(keys, token);
  return {bytes + sketch_code_offset(sketch, dim, slot),
          bytes + sketch_scale_offset(sketch, dim, std::int64_t{1} << keys.page_bits, slot)};
}

// Bytes from one key to the next one of the same page.
template <DType type>
__device__ inline std::int64_t key_pitch(const DevicePagedSource& keys) {
  return keys.dim;
}

__device__ inline bool has_scales(const DevicePagedSource& /*keys*/) { return true; }

// Which group of which page; page -1: the page does not exist.
struct GroupPlace {
  std::int32_t page;
  std::int32_t in_page;
};

// The group whose first key is `token`.
__device__ inline GroupPlace group_place(const DevicePagedSource& keys, std::int64_t token) {
  return {static_cast<std::int32_t>(page_of(keys, token)),
          static_cast<std::int32_t>(slot_of(keys, token) / kGroupSize)};
}

// Elements d … d + 3 of the sum that the cache keeps of a group.
__device__ inline float4 group_sum(const DevicePagedSource& keys, const GroupPlace& group, int d) {
  const float nan = __uint_as_float(kNaNBits);
  return group.page < 0 ? make_float4(nan, nan, nan, nan)
                        : __ldg(reinterpret_cast<const float4*>(keys.page_sums +
                                                                group.page * keys.page_sums_stride +
                                                                group.in_page * keys.dim + d));
}

// The bits of the largest |scale| of a group's keys.
__device__ inline std::uint32_t group_largest(const DevicePagedSource& keys,
                                              const GroupPlace& group) {
  if (group.page < 0) {
    return kNaNBits;
  }
  if (keys.largest_scales != nullptr) {
    return __float_as_uint(
        __ldg(keys.largest_scales + group.page * keys.largest_scales_stride + group.in_page));
  }
  const auto* scales =
      reinterpret_cast<const float4*>(page_scales(keys, group.page) + group.in_page * kGroupSize);
  std::uint32_t largest = 0;
#pragma unroll 4
  for (int i = 0; i < static_cast<int>(kGroupSize) / 4; ++i) {
    const float4 four = __ldg(scales + i);
    for (const float scale : {four.x, four.y, four.z, four.w}) {
      largest = max(largest, __float_as_uint(fabsf(scale)));
    }
  }
  return largest;
}

}  // namespace misa::cuda
