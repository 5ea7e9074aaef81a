// SPDX-License-Identifier: Apache-2.0
// The element conversions, exhaustively.
#include <gtest/gtest.h>

#include <cmath>
#include <limits>

#include "misa/types.hpp"

namespace misa {
namespace {

// The value that the OCP specification gives the bits.
double e4m3_value(int bits) {
  const int exponent = bits >> 3 & 0xf;
  const int mantissa = bits & 7;
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return (bits & 0x80) != 0 ? -magnitude : magnitude;
}

TEST(SmokeE4m3, EveryByteHasItsValue) {
  for (int bits = 0; bits < 256; ++bits) {
    const float value = e4m3_to_float(static_cast<std::uint8_t>(bits));
    if ((bits & 0x7f) == 0x7f) {
      EXPECT_TRUE(std::isnan(value)) << bits;
    } else {
      EXPECT_EQ(value, e4m3_value(bits)) << bits;
      EXPECT_EQ(std::signbit(value), bits >= 128) << bits;
      EXPECT_EQ(float_to_e4m3(value), bits);
    }
  }
}

TEST(SmokeE4m3, RoundsToNearestTiesToEven) {
  for (int bits = 0; bits < 0x7e; ++bits) {
    const auto low = static_cast<float>(e4m3_value(bits));
    const auto high = static_cast<float>(e4m3_value(bits + 1));
    const float middle = (low + high) / 2;  // exact: two values of four bits
    EXPECT_EQ(float_to_e4m3(middle), bits % 2 == 0 ? bits : bits + 1) << middle;
    EXPECT_EQ(float_to_e4m3(std::nextafter(middle, low)), bits) << middle;
    EXPECT_EQ(float_to_e4m3(std::nextafter(middle, high)), bits + 1) << middle;
    EXPECT_EQ(float_to_e4m3(-middle), 0x80 | float_to_e4m3(middle)) << middle;
  }
}

TEST(SmokeE4m3, SaturatesAndKeepsNaN) {
  constexpr float kInfinity = std::numeric_limits<float>::infinity();
  EXPECT_EQ(float_to_e4m3(449), 0x7e);
  EXPECT_EQ(float_to_e4m3(kInfinity), 0x7e);
  EXPECT_EQ(float_to_e4m3(-kInfinity), 0xfe);
  EXPECT_EQ(float_to_e4m3(std::numeric_limits<float>::quiet_NaN()) & 0x7f, 0x7f);
}

TEST(SmokeBf16, RoundTripsEveryValue) {
  for (std::uint32_t bits = 0; bits < 0x10000; ++bits) {
    const float value = bf16_to_float(static_cast<std::uint16_t>(bits));
    if (std::isnan(value)) {
      EXPECT_TRUE(std::isnan(bf16_to_float(float_to_bf16(value)))) << bits;
    } else {
      EXPECT_EQ(float_to_bf16(value), bits);
    }
  }
}

TEST(SmokeBf16, RoundsToNearestTiesToEven) {
  EXPECT_EQ(float_to_bf16(1 + 0x1p-8F), 0x3f80);
  EXPECT_EQ(float_to_bf16(1 + 0x1p-8F + 0x1p-23F), 0x3f81);
  EXPECT_EQ(float_to_bf16(1 + 0x3p-8F), 0x3f82);
  EXPECT_EQ(float_to_bf16(std::numeric_limits<float>::max()), 0x7f80);
}

}  // namespace
}  // namespace misa
