// SPDX-License-Identifier: Apache-2.0
// Conversions between element types. Every e4m3 value is exact in bf16, fp16 and fp32.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include <cstdint>

#include "misa/types.hpp"

namespace misa::cuda {

// Element i of a row of any dtype.
__device__ inline float element(const void* row, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(row)[i];
    case DType::bf16: return bf16_to_float(static_cast<const std::uint16_t*>(row)[i]);
    case DType::e4m3: return e4m3_to_float(static_cast<const std::uint8_t*>(row)[i]);
  }
  return 0;
}

// Products of two pairs of bf16. The first of a pair is in the lower half of its register.
__device__ inline std::uint32_t multiply_bf16x2(std::uint32_t a, std::uint32_t b) {
  const auto product = __hmul2(reinterpret_cast<const __nv_bfloat162&>(a),
                               reinterpret_cast<const __nv_bfloat162&>(b));
  return reinterpret_cast<const std::uint32_t&>(product);
}

// Converts two e4m3 values, one in the upper byte of each half of `pair`.
//  1. Exponent and mantissa move to their places in bf16. This is the value times 2^-120, since the
//     biases are 7 and 127; it holds for subnormals too.
//  2. The product with 2^120 is exact.
//  3. e4m3's NaN, all ones, would come out as 480; it is set to all ones, a NaN in bf16.
__device__ inline std::uint32_t e4m3x2_to_bf16x2(std::uint32_t pair) {
  constexpr std::uint32_t kRescale = 0x7B807B80;  // 2^120, twice
  const std::uint32_t small = (pair & 0x80008000) | (pair >> 4 & 0x07F007F0);
  const std::uint32_t nan = ((pair & 0x7F007F00) + 0x01000100) & 0x80008000;
  return multiply_bf16x2(small, kRescale) | (nan - (nan >> 15));
}

// Converts the four e4m3 values of a register.
__device__ inline void e4m3x4_to_bf16(std::uint32_t bytes, std::uint32_t& low,
                                      std::uint32_t& high) {
  low = e4m3x2_to_bf16x2(__byte_perm(bytes, 0, 0x1404));
  high = e4m3x2_to_bf16x2(__byte_perm(bytes, 0, 0x3424));
}

// The same to fp16: from compute capability 8.9 on, one instruction per pair.
__device__ inline void e4m3x4_to_fp16(std::uint32_t bytes, std::uint32_t& low,
                                      std::uint32_t& high) {
  const auto pair = [](std::uint32_t e4m3x2) {
    const __half2_raw halves =
        __nv_cvt_fp8x2_to_halfraw2(static_cast<__nv_fp8x2_storage_t>(e4m3x2), __NV_E4M3);
    return reinterpret_cast<const std::uint32_t&>(halves);
  };
  low = pair(bytes);
  high = pair(bytes >> 16);
}

// Converts the two fp16 values of a register.
__device__ inline float2 fp16x2_to_floats(std::uint32_t pair) {
  return __half22float2(reinterpret_cast<const __half2&>(pair));
}

}  // namespace misa::cuda
