// SPDX-License-Identifier: Apache-2.0
// How an element of a key becomes e4m3: one definition for the host and for devices.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "misa/cache.hpp"
#include "misa/types.hpp"

namespace misa {

// The scale of a key whose largest |element| is `largest`.
constexpr float quantized_scale(float largest, ScaleFormat format) {
  constexpr float kMinAmax = 1e-4F;  // so that the scale of an all-zero key is not 0
  const float scale = std::max(largest, kMinAmax) / kE4m3Max;
  if (format == ScaleFormat::f32) {
    return scale;
  }
  // The addition carries into the exponent unless the mantissa is zero; infinity stays infinite.
  constexpr std::uint32_t kMantissa = 0x7fffffU;
  return std::bit_cast<float>((std::bit_cast<std::uint32_t>(scale) + kMantissa) & ~kMantissa);
}

// NaN has the sign of the value, since that of a division by the hardware differs between machines.
constexpr std::uint8_t quantized_element(float value, float scale) {
  const float quotient = value / scale;
  if (quotient != quotient) {
    return static_cast<std::uint8_t>((std::bit_cast<std::uint32_t>(value) >> 24 & 0x80U) | 0x7fU);
  }
  return float_to_e4m3(quotient);
}

}  // namespace misa
