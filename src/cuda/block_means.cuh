// SPDX-License-Identifier: Apache-2.0
// Sums of keys for block means, and rows of the block-mean table. Every kernel sums in the same
// order: the keys of a group in order, scale * element added with one rounding; then the groups in
// order.
#pragma once

#include <cuda_fp16.h>

#include <cstdint>

#include "cuda/block_means.hpp"
#include "cuda/elements.cuh"
#include "cuda/key_source.cuh"
#include "cuda/problem.hpp"
#include "cuda/warp.cuh"
#include "misa/types.hpp"

namespace misa::cuda {

// Half a warp sums 64 columns of a group, four columns per lane.
inline constexpr int kLaneColumns = 4;
inline constexpr int kSumColumns = 64;
inline constexpr int kSumLanes = kSumColumns / kLaneColumns;

// Registers per lane for keys in flight, in kernels whose other registers hold operands.
inline constexpr int kFewRegisters = 16;

// An fp32 mean is the sum of two fp16 parts, of 11 bits each.
inline constexpr int kFp16Parts = 2;

// The sum of a group in the four columns of a lane.
struct GroupSum {
  float sum[kLaneColumns];
  std::uint32_t largest;  // bits of the largest |scale|; 0 without scales
};

// Sums columns d … d + 3 of the group whose first key is `token`, with `batch` keys in flight.
// Unless the group is `whole`, keys from `count` on count as zeros. visit(i, sum) is called with
// the sum of keys 0 … i. All lanes of a warp call; the two halves may sum different groups.
template <DType type, int batch, bool whole, class Source, class Visit>
__device__ GroupSum sum_group(const Source& keys, std::int64_t token, int count, int d,
                              const Visit& visit) {
  const int lane = static_cast<int>(threadIdx.x) % kSumLanes;
  const std::int64_t pitch = key_pitch<type>(keys);
  const auto address_of = [&](int key) {
    return key_address<type>(keys, token + key) + d * static_cast<int>(size_of(type));
  };
  const std::byte* row = kPaged<Source> ? nullptr : address_of(0);
  GroupSum group{};
#pragma unroll 1
  for (int first = 0; first < static_cast<int>(kGroupSize); first += batch) {
    if constexpr (kPaged<Source>) {
      static_assert(kSmallestPage % batch == 0);  // the keys of a batch are in one page
      row = whole || first < count ? address_of(first) : nullptr;
    }
    Elements<type, kLaneColumns> elements[batch];
    [[maybe_unused]] float scales[(batch + kSumLanes - 1) / kSumLanes];
#pragma unroll
    for (int i = 0; i < batch; ++i, row += pitch) {
      elements[i].clear();
      if (whole || first + i < count) {
        elements[i].load(row, 0);
      }
    }
    if constexpr (type == DType::e4m3) {
      static_assert(batch % kSumLanes == 0);
#pragma unroll
      for (int i = 0; i < batch / kSumLanes; ++i) {
        const int key = first + i * kSumLanes + lane;
        scales[i] = whole || key < count ? key_scale<type>(keys, token + key) : 0;
        group.largest = max(group.largest, __float_as_uint(fabsf(scales[i])));
      }
    }
#pragma unroll
    for (int i = 0; i < batch; ++i) {
      float value[kLaneColumns];
      elements[i].floats(0, value);
      float scale = 1;
      if constexpr (type == DType::e4m3) {
        scale = __shfl_sync(kFullMask, scales[i / kSumLanes], i % kSumLanes, kSumLanes);
      }
#pragma unroll
      for (int e = 0; e < kLaneColumns; ++e) {
        group.sum[e] = __fmaf_rn(scale, value[e], group.sum[e]);
      }
      visit(first + i, group.sum);
    }
  }
#pragma unroll
  for (int step = 1; step < kSumLanes; step *= 2) {
    group.largest = max(group.largest, __shfl_xor_sync(kFullMask, group.largest, step));
  }
  return group;
}

// Sums columns d … d + 3 of a block of `groups` groups, whose first key is `token`, from the sums
// that the cache keeps, with `batch` of them in flight. All lanes of a warp call, for one block.
template <int batch>
__device__ GroupSum sum_block(const DevicePagedSource& keys, std::int64_t token, int groups,
                              int d) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  GroupSum block{};
#pragma unroll 1
  for (int first = 0; first < groups; first += 32) {
    const int count = min(32, groups - first);
    GroupPlace place{-1, 0};  // of the lane's group
    if (lane < count) {
      place = group_place(keys, token + std::int64_t{first + lane} * kGroupSize);
      block.largest = max(block.largest, group_largest(keys, place));
    }
#pragma unroll 1
    for (int i = 0; i < count; i += batch) {
      float4 sums[batch];
#pragma unroll
      for (int j = 0; j < batch; ++j) {
        const GroupPlace other{__shfl_sync(kFullMask, place.page, i + j),
                               __shfl_sync(kFullMask, place.in_page, i + j)};
        sums[j] = i + j < count ? group_sum(keys, other, d) : float4{};
      }
#pragma unroll
      for (int j = 0; j < batch; ++j) {  // a sum is never -0, so that adding 0 changes nothing
        block.sum[0] = __fadd_rn(block.sum[0], sums[j].x);
        block.sum[1] = __fadd_rn(block.sum[1], sums[j].y);
        block.sum[2] = __fadd_rn(block.sum[2], sums[j].z);
        block.sum[3] = __fadd_rn(block.sum[3], sums[j].w);
      }
    }
  }
  block.largest = __reduce_max_sync(kFullMask, block.largest);
  return block;
}

// A power of two that brings the mean of keys below 2^15, in fp16's upper range; 1 if a scale is
// not finite. `largest`: bits of the keys' largest |scale|. The two parts then hold 22 bits of
// every element of at least 2^-8 of the largest scale; smaller elements have the same absolute
// precision as one of that size.
__device__ inline float fp16_scale(std::uint32_t largest) {
  constexpr int kBias = 127;
  const int exponent = static_cast<int>(largest >> 23);  // biased
  // |mean| <= 448 |scale| < 2^9 * 2^(exponent - 126)
  const int power = exponent == 2 * kBias + 1 ? 0 : min(15 - 9 + kBias - 1 - exponent, kBias - 1);
  return __uint_as_float(static_cast<std::uint32_t>(kBias + power) << 23);
}

// The two parts of a mean, high and low, that fp16_scale has scaled.
struct Fp16Mean {
  __half parts[kFp16Parts];

  __device__ explicit Fp16Mean(float scaled) {
    parts[0] = __float2half_rn(scaled);
    parts[1] = __float2half_rn(isfinite(scaled) ? scaled - __half2float(parts[0]) : 0);
  }
};

template <bool fp16>
inline constexpr int kMeanParts = fp16 ? kFp16Parts : kMaxBf16Parts;

// Stores element d of a mean in its row, part by part; parts are `stride` elements apart.
template <bool fp16>
__device__ void store_mean(float mean, float scale, int d, int dim, std::uint16_t* row,
                           int stride) {
  row += operand_index(d / 4 * 4, dim) + d % 4 / 2 * 8 + d % 2;
  if constexpr (fp16) {
    const Fp16Mean halves(mean * scale);
    row[0] = __half_as_ushort(halves.parts[0]);
    row[stride] = __half_as_ushort(halves.parts[1]);
  } else {
    for (int part = 0; part < kMaxBf16Parts; ++part) {
      row[part * stride] = static_cast<std::uint16_t>(__float_as_uint(bf16_part(mean, part)) >> 16);
    }
  }
}

// The row of the block-mean table for block 0 of a sequence; row base_row + b is for block b.
template <class Index>
__device__ Index base_row(const BlockMeanTable& means, Index sequence_start) {
  return means.bases != nullptr ? means.bases[sequence_start >> means.sequence_bits]
                                : sequence_start / means.block;
}

// A lane's row of a tile: whether the tile has that row, and whether the table holds its mean.
struct RowLookup {
  bool wanted;
  bool found;
};

// Looks up the `count` rows of a tile, of which row 0 is row `first_row` of the table, for the
// sequence that starts at `sequence_start`. The rows are spread over `warps` warps, `rows` each,
// and lane l of a warp looks up the l-th of them. Stores the factors of rows that are found: all of
// them in a `given` table.
template <int rows, int warps, bool given = false>
__device__ RowLookup look_up_rows(const BlockMeanTable& means, std::int32_t sequence_start,
                                  std::int64_t first_row, int count, float* factors) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int tile_row = static_cast<int>(threadIdx.x) / 32 + lane * warps;
  const std::int64_t row = first_row + tile_row;
  const bool wanted = lane < rows && tile_row < count;
  const bool found =
      wanted && row < means.capacity && (given || means.starts[row] == sequence_start);
  if (found) {
    factors[tile_row] = means.factors[row];
  }
  return {wanted, found};
}

// The columns d … d + 3 of which a lane of a warp computes the means. Where D = 64, both halves of
// the warp compute the same.
__device__ inline int mean_column(const BlockMeanTable& means) {
  return static_cast<int>(threadIdx.x) % 32 * kLaneColumns % means.dim;
}

// Writes the mean of a block, of which each lane has the sum of its columns, to `row`, part by
// part; returns its factor.
template <bool fp16>
__device__ float write_mean_of(const GroupSum& block, const BlockMeanTable& means,
                               std::uint16_t* row, int stride) {
  const float scale = fp16 ? fp16_scale(block.largest) : 1;
#pragma unroll
  for (int e = 0; e < kLaneColumns; ++e) {
    store_mean<fp16>(block.sum[e] / static_cast<float>(means.block), scale, mean_column(means) + e,
                     means.dim, row, stride);
  }
  return 1 / scale;
}

// Computes the mean of the block whose first key is `token` and writes it to `row`, part by part;
// returns its factor. All lanes of a warp call. Without sums in the cache it is slow; it takes few
// registers, since its callers hold operands in registers. `fp16` is means.fp16.
template <bool fp16, class Source>
__device__ float write_mean(const Source& keys, const BlockMeanTable& means, std::int64_t token,
                            std::uint16_t* row, int stride) {
  const int d = mean_column(means);
  if constexpr (kPaged<Source>) {
    if (has_sums(keys)) {
      constexpr int kBatch = kFewRegisters / kLaneColumns;
      return write_mean_of<fp16>(sum_block<kBatch>(keys, token, means.block / kGroupSize, d), means,
                                 row, stride);
    }
  }
  GroupSum block{};
  const auto sum_block = [&]<DType type>() {
#pragma unroll 1
    for (std::int32_t first = 0; first < means.block; first += static_cast<int>(kGroupSize)) {
      const GroupSum group = sum_group<type, kFewRegisters / static_cast<int>(size_of(type)), true>(
          keys, token + first, static_cast<int>(kGroupSize), d,
          [](int, const float(&)[kLaneColumns]) {});
      block.largest = max(block.largest, group.largest);
#pragma unroll
      for (int e = 0; e < kLaneColumns; ++e) {
        block.sum[e] = __fadd_rn(block.sum[e], group.sum[e]);
      }
    }
  };
  if constexpr (fp16) {
    sum_block.template operator()<DType::e4m3>();
  } else {
    with_dtype(keys.dtype, sum_block);
  }
  return write_mean_of<fp16>(block, means, row, stride);
}

}  // namespace misa::cuda
