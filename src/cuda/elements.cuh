// SPDX-License-Identifier: Apache-2.0
// Runs of consecutive elements of a row, taken as fp32 or as the bf16 parts that the tensor cores
// multiply. Rows start on 16 bytes: the public plan requires it, the host's copies see to it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/convert.cuh"
#include "misa/types.hpp"

namespace misa::cuda {

// e4m3 and bf16 are exact in one bf16. fp32 is the sum of three: 8 + 8 + 8 mantissa bits.
template <DType type>
inline constexpr int kParts = type == DType::f32 ? 3 : 1;
inline constexpr int kMaxParts = 3;

// What is left of a value after `part` parts took the leading 8 bits each, cut to 8 bits itself.
// All parts have one sign, so no sum over parts exceeds the value. What is not finite has one part.
__device__ inline float bf16_part(float value, int part) {
  if (!isfinite(value)) {
    // A NaN may keep its mark in the bits that are cut off.
    return part > 0 ? 0.0F : isnan(value) ? __uint_as_float(0x7FFFFFFFU) : value;
  }
  for (int i = 0; i < part; ++i) {
    value -= __uint_as_float(__float_as_uint(value) & 0xFFFF0000U);
  }
  return value;
}

// The upper halves of two floats, the first in the lower half.
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
  static constexpr int kPiece = kBytes < 16 ? kBytes : 16;

  std::uint32_t words[kWords];

  // Elements first … first + count - 1 of a row that starts on 16 bytes.
  __device__ void load(const void* row, std::int64_t first) {
    const auto* bytes =
        static_cast<const std::byte*>(row) + first * static_cast<std::int64_t>(size_of(type));
#pragma unroll
    for (int i = 0; i < kBytes / kPiece; ++i) {
      load_piece(bytes + i * kPiece, &words[i * kPiece / 4]);
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
        const float2 two = fp16x2_to_floats(pairs[p]);
        out[2 * p] = two.x;
        out[2 * p + 1] = two.y;
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
      float four[4];
      floats(i, four);
#pragma unroll
      for (float& value : four) {
        value = bf16_part(value, part);
      }
      pairs[0] = upper_halves(four[0], four[1]);
      pairs[1] = upper_halves(four[2], four[3]);
    }
  }

 private:
  __device__ static void load_piece(const std::byte* bytes, std::uint32_t* out) {
    if constexpr (kPiece == 16) {
      const uint4 piece = __ldg(reinterpret_cast<const uint4*>(bytes));
      out[0] = piece.x;
      out[1] = piece.y;
      out[2] = piece.z;
      out[3] = piece.w;
    } else if constexpr (kPiece == 8) {
      const uint2 piece = __ldg(reinterpret_cast<const uint2*>(bytes));
      out[0] = piece.x;
      out[1] = piece.y;
    } else {
      out[0] = __ldg(reinterpret_cast<const std::uint32_t*>(bytes));
    }
  }
};

// Operands of the matrix product keep a row's elements in an order in which the elements that a
// lane multiplies lie side by side in memory: lane c of the four that share a row has elements
// c D/4 … (c + 1) D/4 - 1, and step s of 16 takes four of each lane. Since both operands keep it,
// dot products are what they were.

// Where elements d … d + 3, d a multiple of 4, stand: the first two here, the others 8 on.
constexpr int operand_place(int d, int dim) { return d % (dim / 4) / 4 * 16 + d / (dim / 4) * 2; }

// Elements from one operand row to the next in shared memory: 16 bytes more than the row, so that
// the 8 rows of a matrix lie in different banks.
constexpr int operand_pitch(int dim) { return dim + 8; }

// Stores the parts of elements d … d + 3 of an operand row.
__device__ inline void store_operand(std::uint16_t* row, int d, int dim,
                                     const std::uint32_t (&pairs)[2]) {
  std::uint16_t* place = row + operand_place(d, dim);
  *reinterpret_cast<std::uint32_t*>(place) = pairs[0];
  *reinterpret_cast<std::uint32_t*>(place + 8) = pairs[1];
}

}  // namespace misa::cuda
