// SPDX-License-Identifier: Apache-2.0
// The formats of the sketches: cases computed by hand, then random and adversarial keys against
// brute force.
#include "core/sketch.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <array>
#include <cmath>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/problem.hpp"
#include "support/inputs.hpp"
#include "support/sketch.hpp"

namespace misa::test {
namespace {

constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
constexpr std::uint8_t kOne = 0x38;  // 1 in e4m3

using Bytes = std::vector<std::uint8_t>;

Bytes filled(std::int64_t count, int value) {
  return Bytes(static_cast<std::size_t>(count), static_cast<std::uint8_t>(value));
}

struct Sketch {
  Bytes codes;
  Bytes scales;
};

Sketch encoded(int sketch, const Bytes& key, float scale) {
  const std::int64_t dim = std::ssize(key);
  Sketch out{filled(sketch_code_bytes(sketch, dim), 0xcc),
             filled(sketch_scale_bytes(sketch, dim), 0xcc)};
  encode_sketch(sketch, key.data(), scale, dim, out.codes.data(), out.scales.data());
  return out;
}

// [D] entries, the factor included.
std::vector<double> decoded(int sketch, const Sketch& bytes, std::int64_t dim) {
  std::vector<std::uint16_t> elements(static_cast<std::size_t>(dim));
  const double factor =
      decode_sketch(sketch, bytes.codes.data(), bytes.scales.data(), dim, elements.data());
  std::vector<double> values;
  for (const std::uint16_t element : elements) {
    values.push_back(factor * bf16_to_float(element));
  }
  return values;
}

TEST(SmokeSketch, ElementsAreTheirNumbers) {
  for (int bits = 0; bits < 256; ++bits) {
    const auto byte = static_cast<std::uint8_t>(bits);
    EXPECT_EQ(is_e4m3_nan(byte), std::isnan(e4m3_to_float(byte)));
    if (!is_e4m3_nan(byte)) {
      EXPECT_EQ(static_cast<float>(e4m3_to_fixed(byte)), 512 * e4m3_to_float(byte)) << bits;
    }
  }
  for (int bits = 0; bits < 0x7c00; ++bits) {  // every finite fp16, and the middle to the next
    const float value = fp16_to_float(static_cast<std::uint16_t>(bits));
    const int exponent = std::max(bits >> 10, 1) - 25;
    EXPECT_EQ(value, std::ldexp((bits & 0x3ff) + (bits >= 0x400 ? 0x400 : 0), exponent)) << bits;
    EXPECT_EQ(float_to_fp16(value), bits);
    if (bits < 0x7bff) {
      const float middle = value + std::ldexp(0.5F, exponent);
      EXPECT_EQ(float_to_fp16(middle), bits + bits % 2) << bits;
      EXPECT_EQ(float_to_fp16(std::nextafter(middle, 0.0F)), bits) << bits;
      EXPECT_EQ(float_to_fp16(std::nextafter(middle, kInfinity)), bits + 1) << bits;
    }
  }
  EXPECT_EQ(float_to_fp16(kNaN), kFp16NaN);
  EXPECT_TRUE(std::isnan(fp16_to_float(kFp16NaN)));
}

TEST(SmokeSketch, ConstantsAreRoundedToNearest) {
  for (const std::int64_t dim : {64, 128}) {
    // For u = m 2^-27: (2m - 1)^2 < 4 * 2^54 / D < (2m + 1)^2, or 4 m^2 is equal to it.
    const auto m = static_cast<std::int64_t>(std::ldexp(double{hadamard_unit(dim)}, 27));
    const std::int64_t unit = (std::int64_t{1} << 56) / dim;
    EXPECT_LT((2 * m - 1) * (2 * m - 1), unit);
    EXPECT_LT(unit, (2 * m + 1) * (2 * m + 1));
    // For c = m 2^-36: c^2 = 8122/8192 2^-18 / D.
    const auto c = static_cast<std::int64_t>(std::ldexp(double{level_unit(dim)}, 36));
    const std::int64_t level = (std::int64_t{8122} << 43) / dim;
    EXPECT_LT((2 * c - 1) * (2 * c - 1), level);
    EXPECT_LT(level, (2 * c + 1) * (2 * c + 1));
  }
}

TEST(SmokeSketch, ThePageIsThatOfTheSpecification) {
  EXPECT_EQ(sketch_key_bytes(2, 128), 34);
  EXPECT_EQ(sketch_key_bytes(4, 128), 68);
  EXPECT_EQ(sketch_key_bytes(2, 64), 18);
  EXPECT_EQ(sketch_key_bytes(4, 64), 34);
  EXPECT_EQ(sketch_page_bytes(2, 128, 64), 2176);
  EXPECT_EQ(sketch_code_offset(2, 128, 3), 3 * 32);
  EXPECT_EQ(sketch_scale_offset(2, 128, 64, 3), 64 * 32 + 3 * 2);
  EXPECT_EQ(sketch_code_offset(4, 64, 3), 3 * 32);
  EXPECT_EQ(sketch_scale_offset(4, 64, 32, 3), 32 * 32 + 3 * 2);
}

TEST(SmokeSketch, TwoBitsByHand) {
  // One element of 1: every t is 512 and S = 512^2. 512 * 0x1.687d12p-13 is 0x1.688p-4 in fp16.
  Bytes unit = filled(128, 0);
  unit[0] = kOne;
  Sketch out = encoded(2, unit, 1);
  EXPECT_EQ(out.codes, filled(32, 0xff));
  EXPECT_EQ(out.scales, (Bytes{0xa2, 0x2d}));
  for (const double value : decoded(2, out, 128)) {
    EXPECT_EQ(value, 1.5 * 0x1.688p-4);
  }
  out = encoded(2, unit, -1);
  EXPECT_EQ(out.codes, filled(32, 0x00));
  EXPECT_EQ(out.scales, (Bytes{0xa2, 0x2d}));

  // The last element alone: t_i has the sign of the last row of the matrix, + - - + - + + - …
  Bytes last = filled(64, 0);
  last[63] = kOne;
  out = encoded(2, last, 1);
  EXPECT_EQ(out.codes[0], 0b11'00'00'11);
  EXPECT_EQ(out.codes[1], 0b00'11'11'00);

  // Equal elements: t is 0 but for the first.
  out = encoded(2, filled(128, kOne), 0.5F);
  EXPECT_EQ(out.codes[0], 0xab);
  EXPECT_EQ(Bytes(out.codes.begin() + 1, out.codes.end()), filled(31, 0xaa));
  // The first t is negative, the others are 0, whatever the sign.
  EXPECT_EQ(encoded(2, filled(128, kOne), -0.5F).codes[0], 0xa8);

  for (const float scale : {1.0F, -1.0F, 0.0F, 3e38F}) {
    for (const int zero : {0x00, 0x80}) {
      EXPECT_EQ(encoded(2, filled(64, zero), scale).codes, filled(16, 0xaa));
      EXPECT_EQ(encoded(2, filled(64, zero), scale).scales, (Bytes{0, 0}));
    }
  }
  EXPECT_EQ(encoded(2, unit, 3e38F).scales, (Bytes{0xff, 0x7b}));  // saturates at 65504
  EXPECT_EQ(encoded(2, unit, 1e-45F).scales, (Bytes{0, 0}));

  Bytes nan = filled(64, kOne);
  nan[17] = 0xff;
  for (const auto& [key, scale] :
       std::vector<std::pair<Bytes, float>>{{nan, 1},
                                            {filled(64, kOne), kNaN},
                                            {filled(64, 0), kInfinity},
                                            {filled(64, kOne), -kInfinity}}) {
    EXPECT_EQ(encoded(2, key, scale).codes, filled(16, 0));
    EXPECT_EQ(encoded(2, key, scale).scales, (Bytes{0xff, 0x7f}));
  }
}

TEST(SmokeSketch, BoundsOfLevelsAreExact) {
  // 8192 t^2 = 8122 S for t = 4061 and S = 4096 * 4061: a tie is an outer level only where t >= 0.
  for (const std::int64_t guess : {0, 4060, 4061, 4062, 5000}) {
    const LevelBounds tie = level_bounds(std::int64_t{4096} * 4061, guess);
    EXPECT_EQ(tie.above, 4061);
    EXPECT_EQ(tie.below, -4062);
    EXPECT_EQ(tie.code(4061), 3U);
    EXPECT_EQ(tie.code(4060), 2U);
    EXPECT_EQ(tie.code(0), 2U);
    EXPECT_EQ(tie.code(-1), 1U);
    EXPECT_EQ(tie.code(-4061), 1U);
    EXPECT_EQ(tie.code(-4062), 0U);
  }
  EXPECT_EQ(level_bounds(0, 0).code(0), 2U);
  std::mt19937_64 random(1);
  for (int i = 0; i < 20000; ++i) {
    const std::int64_t squares =
        std::uniform_int_distribution<std::int64_t>(1, std::int64_t{1} << (1 + i % 43))(random);
    const auto near =
        static_cast<std::int64_t>(std::sqrt(8122.0 / 8192 * static_cast<double>(squares)));
    const LevelBounds bounds = level_bounds(squares, near);
    for (std::int64_t t = near - 2; t <= near + 3; ++t) {
      const bool reached = 8192 * t * t >= 8122 * squares;
      const bool beyond = 8192 * t * t > 8122 * squares;
      if (t > 0) {
        ASSERT_EQ(bounds.code(static_cast<std::int32_t>(t)), reached ? 3U : 2U) << squares;
        ASSERT_EQ(bounds.code(static_cast<std::int32_t>(-t)), beyond ? 0U : 1U) << squares;
      }
    }
  }
}

TEST(SmokeSketch, FourBitsByHand) {
  // Largest entry 448: 448 <= 6 * 2^7. In units of 128: 3.5 is a tie, to 4.
  Bytes key = filled(64, 0);
  key[0] = 0x7e;   // 448
  key[1] = 0xf8;   // -256: -2
  key[2] = 0x68;   // 64: 0.5
  key[3] = 0x60;   // 32: 0.25, a tie, to 0
  key[4] = 0xe4;   // -48: -0.375, to -0.5
  key[32] = 0x38;  // 1: in the other group; 1 <= 6 * 2^-2: 4
  key[33] = 0x30;  // 0.5: 2
  Sketch out = encoded(4, key, 1);
  Bytes codes = filled(32, 0);
  codes[0] = 0xc6;
  codes[1] = 0x01;
  codes[2] = 0x09;
  codes[16] = 0x46;
  EXPECT_EQ(out.codes, codes);
  EXPECT_EQ(out.scales, (Bytes{127 + 7, 127 - 2}));
  std::vector<double> values = decoded(4, out, 64);
  EXPECT_EQ(values[0], 512);
  EXPECT_EQ(values[1], -256);
  EXPECT_EQ(values[2], 64);
  EXPECT_EQ(values[3], 0);
  EXPECT_EQ(values[4], -64);
  EXPECT_EQ(values[32], 1);
  EXPECT_EQ(values[33], 0.5);

  // An amax of exactly 6 scale, and a little more. e4m3 has 6 and 6.5.
  key = filled(64, 0);
  key[0] = 0x4c;
  EXPECT_EQ(encoded(4, key, 1).scales[0], 127);
  EXPECT_EQ(encoded(4, key, 1).codes[0], 0x7);
  key[0] = 0x4d;
  EXPECT_EQ(encoded(4, key, 1).scales[0], 128);
  EXPECT_EQ(encoded(4, key, -1).codes[0], 0x8d);  // -3.25, to -3; then -0

  // A group 2^14 below the largest counts; one further does not.
  key[0] = 0x40;   // 2 = 4 * 2^-1
  key[32] = 0x01;  // 2^-9 = 4 * 2^-11
  out = encoded(4, key, 1);
  EXPECT_EQ(decoded(4, out, 64)[32], 0x1p-9);
  out.scales[1] = static_cast<std::uint8_t>(out.scales[0] - 14);
  EXPECT_EQ(decoded(4, out, 64)[32], 4 * 0x1p-15);
  out.scales[1] = static_cast<std::uint8_t>(out.scales[0] - 15);
  EXPECT_EQ(decoded(4, out, 64)[32], 0);

  // Zeros of either sign; a group whose largest entry is the smallest number.
  EXPECT_EQ(encoded(4, filled(64, 0x80), 1).codes, filled(32, 0));
  EXPECT_EQ(encoded(4, filled(64, 0x80), -1).scales, (Bytes{0, 0}));
  out = encoded(4, filled(64, 0x38), 1e-45F);
  EXPECT_EQ(out.scales, (Bytes{0, 0}));
  EXPECT_EQ(out.codes, filled(32, 0));
  out = encoded(4, filled(64, 0x38), 0x1p-126F);
  EXPECT_EQ(out.scales, (Bytes{0, 0}));
  EXPECT_EQ(out.codes, filled(32, 0x44));

  // A NaN is that of its group in the bytes, and of the key in the values.
  key = filled(64, kOne);
  key[40] = 0x7f;
  out = encoded(4, key, 1);
  EXPECT_EQ(out.scales[1], 0xff);
  EXPECT_EQ(out.scales[0], 125);
  values = decoded(4, out, 64);
  EXPECT_TRUE(std::all_of(values.begin(), values.end(), [](double x) { return std::isnan(x); }));
  EXPECT_EQ(encoded(4, filled(64, kOne), kInfinity).scales, (Bytes{0xff, 0xff}));
  EXPECT_EQ(encoded(4, filled(64, 0x7e), 3e38F).scales, (Bytes{0xff, 0xff}));  // overflows
  EXPECT_EQ(encoded(4, filled(64, kOne), 3e38F).scales, (Bytes{253, 253}));
}

// Keys of D elements and their scales.
struct Case {
  std::string name;
  Bytes key;
  float scale;
};

std::vector<Case> cases(std::int64_t dim) {
  std::mt19937_64 random(1);
  const std::vector<float> scales{1,       -1,        0,      -0.0F,     0.0123F,
                                  -3e-5F,  3e38F,     -3e38F, 1e-38F,    1e-45F,
                                  -1e-45F, 0x1p-126F, kNaN,   kInfinity, -kInfinity};
  std::vector<Case> all;
  const auto add = [&](const std::string& name, const auto& element_at) {
    for (const float scale : scales) {
      Case one{name + ", scale " + std::to_string(scale), {}, scale};
      for (std::int64_t d = 0; d < dim; ++d) {
        one.key.push_back(static_cast<std::uint8_t>(element_at(d)));
      }
      all.push_back(one);
    }
  };
  const auto finite = [&] {
    const auto byte = static_cast<std::uint8_t>(random());
    return is_e4m3_nan(byte) ? 0 : int{byte};
  };
  for (int i = 0; i < 40; ++i) {
    add("any bytes but NaN", [&](auto) { return finite(); });
    add("normal",
        [&](auto) { return float_to_e4m3(std::normal_distribution<float>(0, 100)(random)); });
    add("small", [&](auto) { return finite() & 0x87; });  // subnormals and zeros
    add("few", [&](auto) { return random() % 16 == 0 ? finite() : 0; });
  }
  add("zeros", [](auto) { return 0; });
  add("zeros of both signs", [](auto d) { return d % 2 == 0 ? 0 : 0x80; });
  add("largest", [](auto) { return 0x7e; });
  add("largest of both signs", [](auto d) { return d % 3 == 0 ? 0xfe : 0x7e; });
  add("one NaN", [&](auto d) { return d == dim - 3 ? 0xff : 0x38; });
  add("all NaN", [](auto) { return 0x7f; });
  add("groups of other sizes", [](auto d) { return d / 32 == 0 ? 0x7e : d / 32; });
  add("one", [](auto d) { return d == 5 ? 0xb8 : 0; });
  return all;
}

TEST(SmokeSketch, KeysAreThoseOfBruteForce) {
  for (const std::int64_t dim : {64, 128}) {
    for (const Case& each : cases(dim)) {
      for (const int sketch : {2, 4}) {
        const std::string what = std::to_string(sketch) + " bits, " + each.name;
        const SketchedKey expected = brute_force_sketch(sketch, each.key.data(), each.scale, dim);
        const Sketch bytes = encoded(sketch, each.key, each.scale);
        ASSERT_EQ(bytes.codes, expected.codes) << what;
        ASSERT_EQ(bytes.scales, expected.scales) << what;
        const std::vector<double> values = decoded(sketch, bytes, dim);
        for (std::int64_t d = 0; d < dim; ++d) {
          const double value = expected.factor * expected.value[d];
          ASSERT_TRUE(std::isnan(value) ? std::isnan(values[d]) : values[d] == value)
              << what << ", " << d << ": " << values[d] << " for " << value;
        }
        std::vector<std::uint16_t> elements(static_cast<std::size_t>(dim));
        const double factor =
            sketched_key(sketch, each.key.data(), each.scale, dim, elements.data());
        for (std::int64_t d = 0; d < dim && !std::isnan(expected.factor); ++d) {
          ASSERT_EQ(factor * bf16_to_float(elements[d]), values[d]) << what;
        }
      }
    }
  }
}

// Rotation keeps dot products: rotating twice gives the row back.
TEST(SmokeSketch, TheMatrixIsItsOwnInverse) {
  std::vector<std::int64_t> row;
  for (std::int64_t d = 0; d < 128; ++d) {
    row.push_back(d * d - 1000);
  }
  std::vector<std::int64_t> twice = row;
  hadamard(twice.data(), 128);
  EXPECT_NE(twice, row);
  hadamard(twice.data(), 128);
  for (std::int64_t d = 0; d < 128; ++d) {
    EXPECT_EQ(twice[d], 128 * row[d]);
  }
}

TEST(SmokeSketch, RowsAreThoseOfBruteForce) {
  std::mt19937_64 random(1);
  for (const std::int64_t dim : {64, 128}) {
    for (const DType dtype : {DType::f32, DType::bf16, DType::e4m3}) {
      for (const float size : {1.0F, 100.0F, 1e-30F, 1e-44F, 3e36F, 3e38F, 0.0F, kNaN, kInfinity}) {
        std::vector<std::byte> row(static_cast<std::size_t>(dim) * size_of(dtype));
        for (std::int64_t d = 0; d < dim; ++d) {
          const bool special = !std::isfinite(size);
          const float value = special && d == 7 ? size : std::normal_distribution<float>()(random);
          encode(special ? value : value * size, dtype, row.data(), d);
        }
        const std::string what = std::string(name_of(dtype)) + ", " + std::to_string(size);
        std::vector<float> rotated(static_cast<std::size_t>(dim));
        rotate(row.data(), dtype, dim, rotated.data());
        const std::vector<float> expected = brute_force_rotated(row.data(), dtype, dim);
        for (std::int64_t d = 0; d < dim; ++d) {
          ASSERT_TRUE(rotated[d] == expected[d] ||
                      (std::isnan(rotated[d]) && std::isnan(expected[d])))
              << what << ": " << rotated[d] << " for " << expected[d];
        }
        Bytes rounded = filled(dim, 0);
        const float scale = round_to_e4m3(rotated.data(), dim, rounded.data());
        const RoundedRow wanted = brute_force_rounded(expected);
        ASSERT_EQ(scale, wanted.scale) << what;
        for (std::int64_t d = 0; d < dim; ++d) {
          const double value = e4m3_to_float(rounded[d]);
          ASSERT_TRUE(std::isnan(value) ? std::isnan(wanted.value[d]) : value == wanted.value[d])
              << what << ": " << value << " for " << wanted.value[d];
        }
      }
    }
  }
}

}  // namespace
}  // namespace misa::test
