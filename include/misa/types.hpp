// SPDX-License-Identifier: Apache-2.0
/// \file
/// Element types, their conversions and the constants that every other header builds on.
#pragma once

#include <bit>
#include <cmath>
#include <cstddef>
#include <cstdint>

namespace misa {

/// Tokens of a page of the key cache, unless a view says otherwise.
inline constexpr int kPageSize = 64;

/// Tokens of a group. Keys are summed in aligned groups, and block sizes are multiples of a group.
inline constexpr int kGroupSize = 64;

/// Largest number of indexer heads that a call accepts.
inline constexpr int kMaxHeads = 256;

/// Default upper limit of a plan's workspace, in bytes. docs/kernels/step.md tells what a smaller
/// limit costs.
inline constexpr std::size_t kDefaultWorkspaceCap = std::size_t{512} << 20;

/// Largest finite e4m3 value.
inline constexpr float kE4m3Max = 448.0F;

/// Element type of queries and keys.
enum class DType : std::uint8_t {
  f32,   ///< IEEE binary32
  bf16,  ///< the upper half of a binary32
  e4m3,  ///< OCP FP8 E4M3: no infinity, largest finite value 448, NaN is 0x7f and 0xff
};

/// Bytes per element.
constexpr std::size_t size_of(DType type) {
  return type == DType::f32 ? 4 : type == DType::bf16 ? 2 : 1;
}

/// The name that messages and files use: "f32", "bf16" or "e4m3".
constexpr const char* name_of(DType type) {
  return type == DType::f32 ? "f32" : type == DType::bf16 ? "bf16" : "e4m3";
}

constexpr float bf16_to_float(std::uint16_t bits) {
  return std::bit_cast<float>(static_cast<std::uint32_t>(bits) << 16);
}

/// Rounds to nearest, ties to even; NaN stays NaN.
constexpr std::uint16_t float_to_bf16(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if ((bits & 0x7fffffffU) > 0x7f800000U) {
    return static_cast<std::uint16_t>((bits >> 16) | 0x40U);
  }
  return static_cast<std::uint16_t>((bits + 0x7fffU + ((bits >> 16) & 1U)) >> 16);
}

constexpr float e4m3_to_float(std::uint8_t bits) {
  const std::uint32_t magnitude = bits & 0x7fU;
  const std::uint32_t sign = static_cast<std::uint32_t>(bits & 0x80U) << 24;
  if (magnitude == 0x7fU) {
    return std::bit_cast<float>(sign | 0x7fc00000U);
  }
  if (magnitude < 8U) {  // subnormal: a multiple of 2^-9
    const float value = static_cast<float>(magnitude) * 0x1p-9F;
    return sign != 0 ? -value : value;
  }
  return std::bit_cast<float>(sign | ((magnitude << 20) + (120U << 23)));
}

/// Rounds to nearest, ties to even; values beyond 448 and infinities saturate; NaN stays NaN.
constexpr std::uint8_t float_to_e4m3(float value) {
  const auto bits = std::bit_cast<std::uint32_t>(value);
  const auto sign = static_cast<std::uint8_t>((bits >> 24) & 0x80U);
  const std::uint32_t magnitude = bits & 0x7fffffffU;
  if (magnitude > 0x7f800000U) {
    return static_cast<std::uint8_t>(sign | 0x7fU);
  }
  const float absolute = std::bit_cast<float>(magnitude);
  if (absolute >= kE4m3Max) {
    return static_cast<std::uint8_t>(sign | 0x7eU);
  }
  if (absolute < 0x1p-6F) {
    // Adding 2^14 leaves exactly the multiples of 2^-9 in the mantissa, rounded to even.
    const float shifted = absolute + 0x1p14F;
    return static_cast<std::uint8_t>(sign | (std::bit_cast<std::uint32_t>(shifted) & 0xfU));
  }
  const std::uint32_t rounded = magnitude + 0x7ffffU + ((magnitude >> 20) & 1U);
  return static_cast<std::uint8_t>(sign | ((rounded >> 20) - (120U << 3)));
}

}  // namespace misa
