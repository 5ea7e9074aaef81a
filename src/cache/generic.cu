// SPDX-License-Identifier: Apache-2.0
#include "cache/generic.hpp"

#include <cuda_runtime.h>

#include <algorithm>

#include "cache/quantize.hpp"
#include "core/ceil_div.hpp"
#include "core/page.hpp"
#include "core/sketch.hpp"
#include "cuda/convert.cuh"
#include "cuda/launch.cuh"
#include "cuda/sketch.cuh"
#include "cuda/warp.cuh"

namespace misa::cuda::cache {
namespace {

constexpr int kThreads = 128;  // a thread sums one of up to 128 elements
constexpr int kWarps = kThreads / 32;
constexpr int kMaxDim = 128;

// Slots that a thread reads between two votes on whether the block goes on.
constexpr int kSlotsPerVote = 4;

struct AppendArguments {
  CacheSpan cache;
  NewKeys keys;
  const std::int64_t* slots;  // [N]
  ScaleFormat format;
};

struct CopyArguments {
  CacheView source;
  CacheSpan target;
  const std::int32_t* from;  // [N]
  const std::int32_t* to;    // [N]
};

struct RebuildArguments {
  CacheSpan cache;
  const std::int32_t* pages;   // [N]
  const std::int32_t* filled;  // [N] or null
};

// Groups are numbered through all pages, as slots are.

// The sum and the largest scale of the first `tokens` tokens of a group, from the cache's bytes.
// The rounding is that of block means on devices (cuda/block_means.cuh): one multiply-add per
// token, tokens in order. A thread has one element.
__device__ void update_group(const CacheSpan& cache, std::int64_t group, int tokens) {
  const int d = static_cast<int>(threadIdx.x);
  if (d >= cache.dim) {
    return;
  }
  const int dim = static_cast<int>(cache.dim);
  const std::int64_t groups = groups_of(cache.page_size);
  const std::int64_t page = group / groups;
  const std::int64_t in_page = group % groups;
  const std::uint8_t* bytes = cache.data + page * cache.page_stride;
  const std::uint8_t* elements = bytes + in_page * kGroupSize * dim + d;
  const auto* scales = reinterpret_cast<const float*>(
      bytes + scale_offset(dim, cache.page_size, in_page * kGroupSize));
  float sum = 0;
  std::uint32_t largest = 0;  // bits, so that a NaN counts as the largest
#pragma unroll 8
  for (int i = 0; i < tokens; ++i) {
    const float scale = scales[i];
    largest = max(largest, __float_as_uint(scale) & 0x7FFFFFFFU);
    sum = __fmaf_rn(scale, e4m3_to_float(elements[i * dim]), sum);
  }
  cache.page_sums[page * cache.page_sums_stride + in_page * dim + d] = sum;
  if (d == 0 && cache.largest_scales != nullptr) {
    cache.largest_scales[page * cache.largest_scales_stride + in_page] = __uint_as_float(largest);
  }
}

// Writes the sketch of a slot from the cache's bytes, a warp a slot.
__device__ void update_sketch(const CacheSpan& cache, std::int64_t slot) {
  const std::int64_t page = slot / cache.page_size;
  const std::int64_t token = slot % cache.page_size;
  const std::uint8_t* bytes = cache.data + page * cache.page_stride;
  const std::uint8_t* elements = bytes + token * cache.dim;
  const float scale =
      *reinterpret_cast<const float*>(bytes + scale_offset(cache.dim, cache.page_size, token));
  const int bits = cache.sketch_bits;
  std::uint8_t* sketch = cache.sketch + page * cache.sketch_stride;
  std::uint8_t* codes = sketch + sketch_code_offset(bits, cache.dim, token);
  std::uint8_t* scales = sketch + sketch_scale_offset(bits, cache.dim, cache.page_size, token);
  if (cache.dim == kMaxDim) {
    encode_sketch<kMaxDim / 32>(bits, elements, scale, codes, scales);
  } else {
    encode_sketch<2>(bits, elements, scale, codes, scales);
  }
}

// Quantises token `token` of the call into a slot. A lane has every 32nd element.
__device__ void quantize_key(const AppendArguments& arguments, std::int64_t token,
                             std::int64_t slot) {
  const CacheSpan& cache = arguments.cache;
  const NewKeys& keys = arguments.keys;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int dim = static_cast<int>(cache.dim);
  const auto* row = static_cast<const std::byte*>(keys.data) +
                    token * keys.token_stride * static_cast<std::int64_t>(size_of(keys.dtype));
  float values[kMaxDim / 32];
  float largest = 0;
#pragma unroll
  for (int i = 0; i < kMaxDim / 32; ++i) {
    const int d = lane + 32 * i;
    values[i] = d < dim ? element(row, keys.dtype, d) : 0;
    largest = fmaxf(largest, fabsf(values[i]));  // ignores a NaN
  }
  // The bits of nonnegative floats have the order of their values.
  largest = __uint_as_float(__reduce_max_sync(kFullMask, __float_as_uint(largest)));
  const float scale = quantized_scale(largest, arguments.format);
  std::uint8_t* page = cache.data + slot / cache.page_size * cache.page_stride;
  const std::int64_t in_page = slot % cache.page_size;
#pragma unroll
  for (int i = 0; i < kMaxDim / 32; ++i) {
    const int d = lane + 32 * i;
    if (d < dim) {
      page[in_page * dim + d] = quantized_element(values[i], scale);
    }
  }
  if (lane == 0) {
    *reinterpret_cast<float*>(page + scale_offset(dim, cache.page_size, in_page)) = scale;
  }
}

// Appends keys. There is a thread block per token of the call, and the block of the token with the
// last slot of a group writes all of the group, so that no block waits for another one:
//
//  1. Look for the other tokens of the group among the slots of the call, starting behind the
//     token, where a later slot is likely. If there is a later slot, the block has nothing to do.
//  2. Quantise the tokens of the group, a warp a token.
//  3. Write the sketches of these tokens, a warp a token.
//  4. Sum the group up to the last slot.
//
// Of equal slots, the last token of the call counts, in whatever order blocks run.
__global__ void __launch_bounds__(kThreads) append_kernel(const AppendArguments arguments) {
  begin_kernel();
  __shared__ std::int32_t token_of[kGroupSize];  // -1: no token of the call
  const CacheSpan& cache = arguments.cache;
  const std::int64_t end = cache.pages * cache.page_size;
  const std::int64_t tokens = arguments.keys.tokens;
  const std::int64_t own_token = blockIdx.x;
  const std::int64_t own_slot = arguments.slots[own_token];
  if (own_slot < 0 || own_slot >= end) {
    return;
  }
  const std::int64_t group = own_slot / kGroupSize;
  const auto thread = static_cast<int>(threadIdx.x);
  if (thread < kGroupSize) {
    token_of[thread] = -1;
  }
  __syncthreads();

  // 1.
  for (std::int64_t first = 0; first < tokens; first += kThreads * kSlotsPerVote) {
    bool superseded = false;
#pragma unroll
    for (int i = 0; i < kSlotsPerVote; ++i) {
      const std::int64_t behind = first + i * kThreads + thread;
      if (behind >= tokens) {
        continue;
      }
      const std::int64_t past = own_token + behind - tokens;  // negative before the end
      const std::int64_t token = past < 0 ? past + tokens : past;
      const std::int64_t slot = arguments.slots[token];
      if (slot >= 0 && slot < end && slot / kGroupSize == group) {
        atomicMax(&token_of[slot % kGroupSize], static_cast<std::int32_t>(token));
        superseded = superseded || slot > own_slot || (slot == own_slot && token > own_token);
      }
    }
    if (__syncthreads_or(superseded) != 0) {
      return;
    }
  }

  // 2.
  if (arguments.keys.data != nullptr) {
    for (int i = thread / 32; i < kGroupSize; i += kWarps) {
      if (token_of[i] >= 0) {
        quantize_key(arguments, token_of[i], group * kGroupSize + i);
      }
    }
    __syncthreads();
  }

  // 3.
  if (cache.sketch != nullptr) {
    for (int i = thread / 32; i < kGroupSize; i += kWarps) {
      if (token_of[i] >= 0) {
        update_sketch(cache, group * kGroupSize + i);
      }
    }
  }

  // 4.
  if (cache.page_sums != nullptr) {
    update_group(cache, group, static_cast<int>(own_slot % kGroupSize) + 1);
  }
}

// Copies `count` words of a thread block's page.
template <class Word>
__device__ void copy_words(const void* from, void* to, std::int64_t count) {
  for (std::int64_t i = threadIdx.x; i < count; i += kThreads) {
    static_cast<Word*>(to)[i] = static_cast<const Word*>(from)[i];
  }
}

// Copies a page per thread block. A Word is 16 bytes where both caches are aligned to it, else 4.
template <class Word>
__global__ void __launch_bounds__(kThreads) copy_kernel(const CopyArguments arguments) {
  begin_kernel();
  const CacheView& source = arguments.source;
  const CacheSpan& target = arguments.target;
  const std::int64_t from = arguments.from[blockIdx.x];
  const std::int64_t to = arguments.to[blockIdx.x];
  if (from < 0 || from >= source.pages || to < 0 || to >= target.pages) {
    return;
  }
  copy_words<Word>(
      source.data + from * source.page_stride, target.data + to * target.page_stride,
      page_bytes(source.dim, source.page_size) / static_cast<std::int64_t>(sizeof(Word)));
  const std::int64_t groups = groups_of(source.page_size);
  if (target.page_sums != nullptr) {
    copy_words<float>(source.page_sums + from * source.page_sums_stride,
                      target.page_sums + to * target.page_sums_stride, groups * source.dim);
  }
  if (target.largest_scales != nullptr) {
    copy_words<float>(source.largest_scales + from * source.largest_scales_stride,
                      target.largest_scales + to * target.largest_scales_stride, groups);
  }
  if (target.sketch != nullptr) {
    copy_words<uint4>(source.sketch + from * source.sketch_stride,
                      target.sketch + to * target.sketch_stride,
                      sketch_page_bytes(target.sketch_bits, target.dim, target.page_size) /
                          static_cast<std::int64_t>(sizeof(uint4)));
  }
}

// Rebuilds what is derived from the blockIdx.y-th run of 64 tokens of page blockIdx.x of the list,
// a group; a page of 32 tokens has one such run, and no group.
__global__ void __launch_bounds__(kThreads) rebuild_kernel(const RebuildArguments arguments) {
  begin_kernel();
  const CacheSpan& cache = arguments.cache;
  const std::int64_t page = arguments.pages[blockIdx.x];
  if (page < 0 || page >= cache.pages) {
    return;
  }
  const auto page_size = static_cast<int>(cache.page_size);
  const int filled = arguments.filled == nullptr ? page_size : arguments.filled[blockIdx.x];
  const auto in_page = static_cast<int>(blockIdx.y);
  const int tokens = min(max(min(max(filled, 0), page_size) - in_page * kGroupSize, 0), kGroupSize);
  if (cache.sketch != nullptr) {
    for (int i = static_cast<int>(threadIdx.x) / 32; i < tokens; i += kWarps) {
      update_sketch(cache, page * page_size + in_page * kGroupSize + i);
    }
  }
  if (cache.page_sums != nullptr) {
    update_group(cache, page * groups_of(cache.page_size) + in_page, tokens);
  }
}

bool aligned_to_16(const void* data, std::int64_t stride) {
  return reinterpret_cast<std::uintptr_t>(data) % 16 == 0 && stride % 16 == 0;
}

}  // namespace

void launch_append(const CacheSpan& cache, const NewKeys& keys, const std::int64_t* slots,
                   ScaleFormat format, void* stream) {
  launch_kernel("append keys", append_kernel, dim3(static_cast<unsigned>(keys.tokens)), kThreads, 0,
                stream, AppendArguments{cache, keys, slots, format});
}

void launch_copy(const CacheView& source, const std::int32_t* from, const CacheSpan& target,
                 const std::int32_t* to, std::int64_t count, void* stream) {
  const bool wide = aligned_to_16(source.data, source.page_stride) &&
                    aligned_to_16(target.data, target.page_stride);
  launch_kernel("copy pages", wide ? copy_kernel<uint4> : copy_kernel<std::uint32_t>,
                dim3(static_cast<unsigned>(count)), kThreads, 0, stream,
                CopyArguments{source, target, from, to});
}

void launch_rebuild(const CacheSpan& cache, const std::int32_t* pages, const std::int32_t* filled,
                    std::int64_t count, void* stream) {
  const dim3 grid(static_cast<unsigned>(count),
                  static_cast<unsigned>(ceil_div(cache.page_size, kGroupSize)));
  launch_kernel("rebuild", rebuild_kernel, grid, kThreads, 0, stream,
                RebuildArguments{cache, pages, filled});
}

}  // namespace misa::cuda::cache
