// SPDX-License-Identifier: Apache-2.0
// The sums behind block means. Every sum has one order, whoever computes it: scale * element is
// added with one rounding, tokens in order inside a page, then pages in order.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/block_means.hpp"
#include "cuda/elements.cuh"
#include "cuda/problem.hpp"
#include "cuda/warp.cuh"
#include "misa/types.hpp"

namespace misa::cuda {

// Half a warp sums a page in 64 columns, four a lane.
inline constexpr int kLaneElements = 4;
inline constexpr int kColumns = 64;
inline constexpr int kLanes = kColumns / kLaneElements;

// Registers of keys in flight where others hold the registers.
inline constexpr int kFewWords = 16;

// fp32 as the sum of fp16: 11 + 11 bits.
inline constexpr int kFp16Parts = 2;

// The sum of a page in four columns.
struct PageSum {
  float sum[kLaneElements];
  std::uint32_t largest;  // bits of the largest |scale|; 0 without scales
};

// Sums the page from `token` on in columns d … d + 3, `batch` keys in flight. Unless it is `whole`,
// zeros stand for keys from `count` on. visit(i, sum) is told every sum of keys 0 … i. A warp
// calls; its halves may differ in arguments.
template <DType type, int batch, bool whole, class Visit>
__device__ PageSum sum_page(const Keys& keys, std::int64_t token, int count, int d,
                            const Visit& visit) {
  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const std::int64_t pitch = keys.stride * static_cast<std::int64_t>(size_of(type));
  const auto* row = static_cast<const std::byte*>(keys.data) + token * pitch +
                    d * static_cast<int>(size_of(type));
  PageSum page{};
#pragma unroll 1
  for (int first = 0; first < static_cast<int>(kPageSize); first += batch) {
    Elements<type, kLaneElements> elements[batch];
    [[maybe_unused]] float scales[(batch + kLanes - 1) / kLanes];
#pragma unroll
    for (int i = 0; i < batch; ++i, row += pitch) {
      elements[i].clear();
      if (whole || first + i < count) {
        elements[i].load(row, 0);
      }
    }
    if constexpr (type == DType::e4m3) {
      static_assert(batch % kLanes == 0);
#pragma unroll
      for (int i = 0; i < batch / kLanes; ++i) {
        const int key = first + i * kLanes + lane;
        scales[i] = whole || key < count ? __ldg(keys.scale + token + key) : 0;
        page.largest = max(page.largest, __float_as_uint(fabsf(scales[i])));
      }
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      float value[kLaneElements];
      elements[i].floats(0, value);
      float scale = 1;
      if constexpr (type == DType::e4m3) {
        scale = __shfl_sync(kFullMask, scales[i / kLanes], i % kLanes, kLanes);
      }
#pragma unroll
      for (int e = 0; e < kLaneElements; ++e) {
        page.sum[e] = __fmaf_rn(scale, value[e], page.sum[e]);
      }
      visit(first + i, page.sum);
    }
  }
#pragma unroll
  for (int step = 1; step < kLanes; step *= 2) {
    page.largest = max(page.largest, __shfl_xor_sync(kFullMask, page.largest, step));
  }
  return page;
}

// A power of two that takes the mean of keys, of whose scales this is the largest, to below 2^15,
// in fp16's upper range; 1 if a scale is not finite. So the parts have 22 bits of every element,
// or of 2^-8 of the largest scale where an element is smaller than that.
__device__ inline float fp16_scale(std::uint32_t largest) {
  constexpr int kBias = 127;
  const int exponent = static_cast<int>(largest >> 23);  // biased
  // |mean| <= 448 |scale| < 2^9 * 2^(exponent - 126)
  const int power = exponent == 2 * kBias + 1 ? 0 : min(15 - 9 + kBias - 1 - exponent, kBias - 1);
  return __uint_as_float(static_cast<std::uint32_t>(kBias + power) << 23);
}

template <bool fp16>
inline constexpr int kMeanParts = fp16 ? kFp16Parts : kMaxParts;

// Stores the parts of element d of a mean of D elements in its row, `stride` elements from part to
// part.
template <bool fp16>
__device__ void store_mean(float mean, float scale, int d, int dim, std::uint16_t* row,
                           int stride) {
  row += operand_place(d / 4 * 4, dim) + d % 4 / 2 * 8 + d % 2;
  if constexpr (fp16) {
    const float scaled = mean * scale;
    const __half high = __float2half_rn(scaled);
    const float rest = isfinite(scaled) ? scaled - __half2float(high) : 0;
    row[0] = __half_as_ushort(high);
    row[stride] = __half_as_ushort(__float2half_rn(rest));
  } else {
    for (int part = 0; part < kMaxParts; ++part) {
      row[part * stride] = static_cast<std::uint16_t>(__float_as_uint(bf16_part(mean, part)) >> 16);
    }
  }
}

// Whether a lane's row of a tile is asked for, and whether the table has it.
struct Asked {
  bool wanted;
  bool listed;
};

// The `count` means of a tile from row0 of the table on, for the sequence that starts at `start`:
// warps deal them out, `rows` each, and lane l asks for its warp's row l. Factors of those that the
// table has are stored.
template <int rows, int warps>
__device__ Asked ask_table(const BlockMeans& means, std::int32_t start, std::int64_t row0,
                           int count, float* factors) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int asked = static_cast<int>(threadIdx.x) / 32 + lane * warps;
  const std::int64_t row = row0 + asked;
  const bool wanted = lane < rows && asked < count;
  const bool listed = wanted && row < means.capacity && means.starts[row] == start;
  if (listed) {
    factors[asked] = means.factors[row];
  }
  return {wanted, listed};
}

// Writes a block's mean from its keys, the first being `token`; returns its factor. A warp works,
// slowly but in few registers, for its callers hold operands. BlockMeans are in fp16 where `fp16`
// is.
template <bool fp16>
__device__ float write_mean(const Keys& keys, const BlockMeans& means, std::int64_t token,
                            std::uint16_t* row, int stride) {
  // Where D = 64 both halves of the warp do the same.
  const int d = static_cast<int>(threadIdx.x) % 32 * kLaneElements % means.dim;
  float sum[kLaneElements] = {};
  std::uint32_t largest = 0;
  const auto sum_block = [&]<DType type>() {
#pragma unroll 1
    for (std::int32_t first = 0; first < means.block; first += static_cast<int>(kPageSize)) {
      const PageSum page = sum_page<type, kFewWords / static_cast<int>(size_of(type)), true>(
          keys, token + first, static_cast<int>(kPageSize), d,
          [](int, const float(&)[kLaneElements]) {});
      largest = max(largest, page.largest);
#pragma unroll
      for (int e = 0; e < kLaneElements; ++e) {
        sum[e] = __fadd_rn(sum[e], page.sum[e]);
      }
    }
  };
  if constexpr (fp16) {
    sum_block.template operator()<DType::e4m3>();
  } else {
    with_dtype(keys.dtype, sum_block);
  }
  const float scale = fp16 ? fp16_scale(largest) : 1;
#pragma unroll
  for (int e = 0; e < kLaneElements; ++e) {
    store_mean<fp16>(sum[e] / static_cast<float>(means.block), scale, d + e, means.dim, row,
                     stride);
  }
  return 1 / scale;
}

}  // namespace misa::cuda
