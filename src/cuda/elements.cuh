// SPDX-License-Identifier: Apache-2.0
// Consecutive elements of a row in registers, as fp32 or as the parts that tensor cores multiply.
// Rows are aligned to 16 bytes: plans require it of device arrays, and host arrays are copied to
// aligned rows.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/convert.cuh"
#include "misa/types.hpp"

namespace misa::cuda {

// e4m3 and bf16 are exact in one bf16. fp32 is the sum of three, of 8 mantissa bits each.
template <DType type>
inline constexpr int kBf16Parts = type == DType::f32 ? 3 : 1;
inline constexpr int kMaxBf16Parts = 3;

// Part number `part` of a value: 8 mantissa bits of what earlier parts left. All parts have the
// sign of the value, so no partial sum exceeds it. Infinities and NaN have one part.
__device__ inline float bf16_part(float value, int part) {
  if (!isfinite(value)) {
    // A NaN's mantissa may be zero in the bits that bf16 keeps.
    return part > 0 ? 0.0F : isnan(value) ? __uint_as_float(0x7FFFFFFFU) : value;
  }
  for (int i = 0; i < part; ++i) {
    value -= __uint_as_float(__float_as_uint(value) & 0xFFFF0000U);
  }
  return value;
}

// The upper halves of two floats in one register, the first in its lower half.
__device__ inline std::uint32_t upper_halves(float first, float second) {
  return __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x7632);
}

// Calls visit.template operator()<dtype>().
template <class Visit>
__device__ void with_dtype(DType dtype, const Visit& visit) {
  switch (dtype) {
    case DType::f32: visit.template operator()<DType::f32>(); break;
    case DType::bf16: visit.template operator()<DType::bf16>(); break;
    case DType::e4m3: visit.template operator()<DType::e4m3>(); break;
  }
}

template <DType type, int count>
struct Elements {
  static constexpr int kBytes = count * static_cast<int>(size_of(type));
  static constexpr int kWords = kBytes / 4;
  static constexpr int kLoadBytes = kBytes < 16 ? kBytes : 16;  // bytes that one load reads

  std::uint32_t words[kWords];

  // Loads elements first … first + count - 1 of a row that starts on 16 bytes.
  __device__ void load(const void* row, std::int64_t first) {
    const auto* bytes =
        static_cast<const std::byte*>(row) + first * static_cast<std::int64_t>(size_of(type));
#pragma unroll
    for (int i = 0; i < kBytes / kLoadBytes; ++i) {
      load_words(bytes + i * kLoadBytes, &words[i * kLoadBytes / 4]);
    }
  }

  __device__ void clear() {
#pragma unroll
    for (std::uint32_t& word : words) {
      word = 0;
    }
  }

  // Elements 4 i … 4 i + 3 as fp32.
  __device__ void floats(int i, float (&out)[4]) const {
    if constexpr (type == DType::f32) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        out[e] = __uint_as_float(words[4 * i + e]);
      }
    } else if constexpr (type == DType::e4m3) {
      std::uint32_t pairs[2];
      fp16(i, pairs);
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const float2 values = fp16x2_to_floats(pairs[p]);
        out[2 * p] = values.x;
        out[2 * p + 1] = values.y;
      }
    } else {
      std::uint32_t pairs[2];
      parts(i, 0, pairs);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        out[e] = __uint_as_float(e % 2 == 0 ? pairs[e / 2] << 16 : pairs[e / 2] & 0xFFFF0000U);
      }
    }
  }

  // Elements 4 i … 4 i + 3 as fp16.
  __device__ void fp16(int i, std::uint32_t (&pairs)[2]) const {
    static_assert(type == DType::e4m3);
    e4m3x4_to_fp16(words[i], pairs[0], pairs[1]);
  }

  // The bf16 parts of elements 4 i … 4 i + 3.
  __device__ void parts(int i, int part, std::uint32_t (&pairs)[2]) const {
    if constexpr (type == DType::e4m3) {
      e4m3x4_to_bf16(words[i], pairs[0], pairs[1]);
    } else if constexpr (type == DType::bf16) {
      pairs[0] = words[2 * i];
      pairs[1] = words[2 * i + 1];
    } else {
      float values[4];
      floats(i, values);
#pragma unroll
      for (float& value : values) {
        value = bf16_part(value, part);
      }
      pairs[0] = upper_halves(values[0], values[1]);
      pairs[1] = upper_halves(values[2], values[3]);
    }
  }

 private:
  __device__ static void load_words(const std::byte* bytes, std::uint32_t* out) {
    if constexpr (kLoadBytes == 16) {
      const uint4 loaded = __ldg(reinterpret_cast<const uint4*>(bytes));
      out[0] = loaded.x;
      out[1] = loaded.y;
      out[2] = loaded.z;
      out[3] = loaded.w;
    } else if constexpr (kLoadBytes == 8) {
      const uint2 loaded = __ldg(reinterpret_cast<const uint2*>(bytes));
      out[0] = loaded.x;
      out[1] = loaded.y;
    } else {
      out[0] = __ldg(reinterpret_cast<const std::uint32_t*>(bytes));
    }
  }
};

// Operand order: elements of a row are permuted, in both operands of a matrix product, which leaves
// dot products as they are. Lane c of the four that share a row then multiplies the consecutive
// elements c D/4 … (c + 1) D/4 - 1, four of them in each MMA of depth 16, so that it loads them
// from memory with wide loads.

// The index of element d in operand order, where d is a multiple of 4. Element d + 1 follows it;
// elements d + 2 and d + 3 are 8 further.
constexpr int operand_index(int d, int dim) { return d % (dim / 4) / 4 * 16 + d / (dim / 4) * 2; }

// The distance in elements between operand rows in shared memory: 16 bytes more than a row, so that
// the 8 rows that one ldmatrix reads lie in different banks.
constexpr int operand_pitch(int dim) { return dim + 8; }

// Stores elements d … d + 3 of an operand row.
__device__ inline void store_operand(std::uint16_t* row, int d, int dim,
                                     const std::uint32_t (&pairs)[2]) {
  std::uint16_t* const out = row + operand_index(d, dim);
  *reinterpret_cast<std::uint32_t*>(out) = pairs[0];
  *reinterpret_cast<std::uint32_t*>(out + 8) = pairs[1];
}

}  // namespace misa::cuda
