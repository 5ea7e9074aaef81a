// SPDX-License-Identifier: Apache-2.0
// Sketches of keys as a warp encodes them, with the bytes of misa::encode_sketch (core/sketch.hpp).
#pragma once

#include <cstdint>
#include <limits>

#include "core/sketch.hpp"
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

}  // namespace misa::cuda
