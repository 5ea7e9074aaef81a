// SPDX-License-Identifier: Apache-2.0
// Sketches of keys as a warp encodes them, with the bytes of misa::encode_sketch (core/sketch.hpp).
#pragma once

#include <cstdint>
#include <limits>

#include "core/sketch.hpp"
#include "cuda/convert.cuh"
#include "cuda/hadamard.cuh"
#include "cuda/warp.cuh"

namespace misa::cuda {

// A lane's elements of a key of D = 32 `count` in e4m3: elements `count` l … of lane l.
template <int count>
struct KeyPart {
  static_assert(count == 2 || count == 4);
  std::uint8_t element[count];
};

// Codes of `bits` bits each, the first one in the low bits.
template <int bits, int count>
__device__ inline std::uint32_t packed_codes(const std::uint32_t (&code)[count]) {
  std::uint32_t packed = 0;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    packed |= code[i] << (bits * i);
  }
  return packed;
}

template <int count>
__device__ inline void encode_rotated(const KeyPart<count>& key, float scale, std::uint8_t* codes,
                                      std::uint8_t* scales) {
  constexpr int kDim = 32 * count;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::int32_t t[count];
  std::int64_t sum_squares = 0;
  bool nan = !isfinite(scale);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const std::int32_t fixed = e4m3_to_fixed(key.element[i]);
    t[i] = scale < 0 ? -fixed : fixed;
    sum_squares += std::int64_t{fixed} * fixed;
    nan = nan || is_e4m3_nan(key.element[i]);
  }
  nan = __any_sync(kFullMask, nan);
#pragma unroll
  for (int stride = 1; stride < 32; stride *= 2) {
    sum_squares += __shfl_xor_sync(kFullMask, sum_squares, stride);
  }
  warp_hadamard(t);
  constexpr float kStep = static_cast<float>(kLevelSquare) / static_cast<float>(kLevelSquareOf);
  const auto squares = static_cast<float>(sum_squares);
  const LevelBounds bounds =
      level_bounds(sum_squares, static_cast<std::int64_t>(__fsqrt_rn(kStep * squares)));
  std::uint32_t code[count];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    code[i] = nan ? 0 : bounds.code(t[i]);
  }
  // A byte has four codes: those of one lane, or of two.
  std::uint32_t byte = packed_codes<2>(code);
  constexpr int kByteLanes = 4 / count;
  if constexpr (kByteLanes == 2) {
    byte |= __shfl_down_sync(kFullMask, byte, 1) << 4;
  }
  if (lane % kByteLanes == 0) {
    codes[lane / kByteLanes] = static_cast<std::uint8_t>(byte);
  }
  if (lane == 0) {
    constexpr float kLargestFp16 = 65504;
    const float level = __fsqrt_rn(squares) * level_unit(kDim);
    const std::uint16_t bits =
        nan ? kFp16NaN : float_to_fp16(fminf(kLargestFp16, fabsf(scale) * level));
    scales[0] = static_cast<std::uint8_t>(bits);
    scales[1] = static_cast<std::uint8_t>(bits >> 8);
  }
}

template <int count>
__device__ inline void encode_mxfp4(const KeyPart<count>& key, float scale, std::uint8_t* codes,
                                    std::uint8_t* scales) {
  constexpr int kGroupLanes = kSketchGroup / count;
  constexpr std::uint32_t kInfinity = 0x7F800000;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float k[count];
  std::uint32_t largest = 0;  // bits, whose order is that of the values; NaN is above all of them
#pragma unroll
  for (int i = 0; i < count; ++i) {
    k[i] = scale * e4m3_to_float(key.element[i]);
    largest = max(largest, __float_as_uint(k[i]) & 0x7FFFFFFFU);
  }
#pragma unroll
  for (int stride = 1; stride < kGroupLanes; stride *= 2) {
    largest = max(largest, __shfl_xor_sync(kFullMask, largest, stride));
  }
  const bool finite = largest < kInfinity;
  const bool coded = finite && largest > 0;
  const std::uint32_t exponent = !finite ? kUe8m0NaN
                                 : coded ? ue8m0_for(__uint_as_float(largest))
                                         : 0;
  std::uint32_t code[count] = {};
  if (coded) {
    const float inverse = __uint_as_float((254 - exponent) << 23);  // exponent is at most 253
#pragma unroll
    for (int i = 0; i < count; ++i) {
      code[i] = __float_as_uint(k[i]) >> 31 << 3 | e2m1_code(fabsf(k[i]) * inverse);
    }
  }
  const std::uint32_t bytes = packed_codes<4>(code);
#pragma unroll
  for (int i = 0; i < count / 2; ++i) {
    codes[lane * (count / 2) + i] = static_cast<std::uint8_t>(bytes >> (8 * i));
  }
  if (lane % kGroupLanes == 0) {
    scales[lane / kGroupLanes] = static_cast<std::uint8_t>(exponent);
  }
}

// Writes the codes and the scales of a key of which each lane of a warp has a part.
template <int count>
__device__ inline void encode_sketch(int sketch, const KeyPart<count>& key, float scale,
                                     std::uint8_t* codes, std::uint8_t* scales) {
  if (is_rotated(sketch)) {
    encode_rotated(key, scale, codes, scales);
  } else {
    encode_mxfp4(key, scale, codes, scales);
  }
}

// The same of a key in memory.
template <int count>
__device__ inline void encode_sketch(int sketch, const std::uint8_t* elements, float scale,
                                     std::uint8_t* codes, std::uint8_t* scales) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  KeyPart<count> key;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    key.element[i] = elements[lane * count + i];
  }
  encode_sketch(sketch, key, scale, codes, scales);
}

// The codes and the scales of a key's sketch in memory.
struct SketchBytes {
  const std::uint8_t* codes;
  const std::uint8_t* scales;
};

// What a sketch stands for: entry d is a bf16 number times one factor for all of a key.

// The factor, NaN if the whole key is.
__device__ inline float sketch_factor(int sketch, const std::uint8_t* scales, int dim) {
  if (is_rotated(sketch)) {
    return fp16_to_float(static_cast<std::uint16_t>(scales[0] | scales[1] << 8));
  }
  std::uint8_t largest = 0;
  for (int group = 0; group < dim / kSketchGroup; ++group) {
    largest = max(largest, scales[group]);
  }
  return ue8m0_to_float(largest);
}

// Two bf16 entries from the low bits of `codes`.
__device__ inline std::uint32_t rotated_pair(std::uint32_t codes) {
  constexpr std::uint64_t kLevels = 0x3FC03F00BF00BFC0;  // -1.5, -0.5, 0.5 and 1.5
  return static_cast<std::uint32_t>(kLevels >> (16 * (codes & 3)) & 0xFFFF) |
         static_cast<std::uint32_t>(kLevels >> (16 * (codes >> 2 & 3))) << 16;
}

// Two e2m1 entries of a group from the low byte of `codes`, in units of the key's factor.
//  1. Exponent and mantissa move to their places in bf16. This is the value times 2^-126, since the
//     biases are 1 and 127; it holds for the subnormal 0.5 too.
//  2. The product with 2^126 and the group's scale is exact.
__device__ inline std::uint32_t mxfp4_pair(std::uint32_t codes, std::uint32_t group_factor) {
  const std::uint32_t apart = (codes & 0xF) | (codes & 0xF0) << 12;
  return multiply_bf16x2((apart & 0x00070007) << 6 | (apart & 0x00080008) << 12, group_factor);
}

// The factors of mxfp4_pair for a group whose exponent is `below` less than the key's largest.
__device__ inline std::uint32_t mxfp4_group_factor(int below) {
  return below > kSketchReach ? 0
                              : static_cast<std::uint32_t>(253 - below) << 7 |
                                    static_cast<std::uint32_t>(253 - below) << 23;
}

// Entries d … d + 7 of a key, where d is a multiple of 8. Codes are aligned to 4 bytes.
__device__ inline void decode_sketch(int sketch, const SketchBytes& from, int d, int dim,
                                     std::uint32_t (&pairs)[4]) {
  if (is_rotated(sketch)) {
    const std::uint32_t eight = *reinterpret_cast<const std::uint16_t*>(from.codes + d / 4);
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      pairs[i] = rotated_pair(eight >> (4 * i));
    }
    return;
  }
  int largest = 0;
  for (int group = 0; group < dim / kSketchGroup; ++group) {
    largest = max(largest, int{from.scales[group]});
  }
  const std::uint32_t factor = mxfp4_group_factor(largest - from.scales[d / kSketchGroup]);
  const std::uint32_t eight = *reinterpret_cast<const std::uint32_t*>(from.codes + d / 2);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    pairs[i] = mxfp4_pair(eight >> (8 * i) & 0xFF, factor);
  }
}

}  // namespace misa::cuda
