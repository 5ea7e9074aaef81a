// SPDX-License-Identifier: Apache-2.0
// The sketches of keys: coarse copies of e4m3 keys, by which the first stage of a re-ranked
// configuration may score (IndexerConfig::sketch; docs/spec.md). A key's sketch is a function of
// its elements and its scale alone. Functions take the sketch by its bits an element:
//
//   2  entries of the rotated key, each one of four equidistant levels; one fp16 scale a key
//   4  MXFP4: e2m1 entries, and a ue8m0 scale for every 32 of them
#pragma once

#include <bit>
#include <cstdint>

#include "misa/types.hpp"

namespace misa {

// The largest D.
inline constexpr std::int64_t kMaxSketchDim = 128;

// Entries of a 4-bit sketch that share a scale.
inline constexpr std::int64_t kSketchGroup = 32;

// Whether a sketch holds rotated keys. Rows that score it are rotated too.
constexpr bool is_rotated(int sketch) { return sketch == 2; }

// Layout. A page of n keys holds the codes of its keys, then their scales.

constexpr std::int64_t sketch_code_bytes(int sketch, std::int64_t dim) { return dim * sketch / 8; }
constexpr std::int64_t sketch_scale_bytes(int sketch, std::int64_t dim) {
  return is_rotated(sketch) ? 2 : dim / kSketchGroup;
}
// Bytes of one key.
constexpr std::int64_t sketch_key_bytes(int sketch, std::int64_t dim) {
  return sketch_code_bytes(sketch, dim) + sketch_scale_bytes(sketch, dim);
}
inline constexpr std::int64_t kMaxSketchKeyBytes = sketch_key_bytes(4, kMaxSketchDim);

// Bytes of a page of `keys` keys, and where the codes and the scales of its key i are.
constexpr std::int64_t sketch_page_bytes(int sketch, std::int64_t dim, std::int64_t keys) {
  return keys * sketch_key_bytes(sketch, dim);
}
constexpr std::int64_t sketch_code_offset(int sketch, std::int64_t dim, std::int64_t i) {
  return i * sketch_code_bytes(sketch, dim);
}
constexpr std::int64_t sketch_scale_offset(int sketch, std::int64_t dim, std::int64_t keys,
                                           std::int64_t i) {
  return keys * sketch_code_bytes(sketch, dim) + i * sketch_scale_bytes(sketch, dim);
}

// Elements.

inline constexpr std::uint16_t kFp16NaN = 0x7fff;

// Rounds 0 to 65504 to nearest, ties to even; NaN becomes kFp16NaN.
constexpr std::uint16_t float_to_fp16(float value) {
  if (value != value) {
    return kFp16NaN;
  }
  const auto bits = std::bit_cast<std::uint32_t>(value);
  if (value < 0x1p-14F) {
    // Adding 1/2 leaves exactly the multiples of 2^-24 in the mantissa, rounded to even.
    return static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(value + 0.5F) & 0x7ffU);
  }
  return static_cast<std::uint16_t>(((bits + 0xfffU + ((bits >> 13) & 1U)) >> 13) - (112U << 10));
}

// The value of a number without sign, or of a NaN.
constexpr float fp16_to_float(std::uint16_t bits) {
  const std::uint32_t magnitude = bits & 0x7fffU;
  if (magnitude < 0x400U) {
    return static_cast<float>(magnitude) * 0x1p-24F;
  }
  const std::uint32_t exponent = magnitude < 0x7c00U ? 112U : 224U;
  return std::bit_cast<float>((magnitude << 13) + (exponent << 23));
}

// An e4m3 number times 2^9, an integer.
constexpr std::int32_t e4m3_to_fixed(std::uint8_t bits) {
  const int exponent = bits >> 3 & 0xf;
  const int mantissa = bits & 0x7;
  const std::int32_t magnitude = exponent == 0 ? mantissa : (8 + mantissa) << (exponent - 1);
  return (bits & 0x80) != 0 ? -magnitude : magnitude;
}
inline constexpr float kE4m3Unit = 0x1p-9F;

constexpr bool is_e4m3_nan(std::uint8_t bits) { return (bits & 0x7fU) == 0x7fU; }

// Rounds a magnitude to e2m1 (0, 0.5, 1, 1.5, 2, 3, 4, 6), ties to the even code; saturates.
constexpr std::uint8_t e2m1_code(float magnitude) {
  return static_cast<std::uint8_t>((magnitude > 0.25F) + (magnitude >= 0.75F) +
                                   (magnitude > 1.25F) + (magnitude >= 1.75F) + (magnitude > 2.5F) +
                                   (magnitude >= 3.5F) + (magnitude > 5.0F));
}

// The value of an e2m1 code; bit 3 is the sign.
constexpr float e2m1_to_float(unsigned code) {
  constexpr float kMagnitudes[8] = {0.0F, 0.5F, 1.0F, 1.5F, 2.0F, 3.0F, 4.0F, 6.0F};
  return (code & 8U) != 0 ? -kMagnitudes[code & 7U] : kMagnitudes[code & 7U];
}

inline constexpr std::uint8_t kUe8m0NaN = 0xff;

// The smallest ue8m0 scale with which e2m1 reaches a finite magnitude: 6 scale >= magnitude > 0.
constexpr std::uint8_t ue8m0_for(float magnitude) {
  const auto bits = std::bit_cast<std::uint32_t>(magnitude);
  // 4 scale <= magnitude < 8 scale; beyond 6 scale the next one is needed.
  const int exponent = static_cast<int>(bits >> 23) - 2;
  const int next = (bits & 0x7fffffU) > 0x400000U ? 1 : 0;
  return static_cast<std::uint8_t>(exponent + next > 0 ? exponent + next : 0);
}

constexpr float ue8m0_to_float(std::uint8_t bits) {
  if (bits == kUe8m0NaN) {
    return std::bit_cast<float>(0x7fc00000U);
  }
  return std::bit_cast<float>(bits == 0 ? 0x00400000U : std::uint32_t{bits} << 23);
}

// Groups of a 4-bit sketch whose scale is further than 2^14 below the key's largest count as zero.
inline constexpr int kSketchReach = 14;

// Rotation.

// Replaces a row by its product with the Sylvester-Hadamard matrix, of entries ±1.
template <class T>
constexpr void hadamard(T* row, std::int64_t dim) {
  for (std::int64_t stride = 1; stride < dim; stride *= 2) {
    for (std::int64_t first = 0; first < dim; first += 2 * stride) {
      for (std::int64_t i = first; i < first + stride; ++i) {
        const T sum = row[i] + row[i + stride];
        row[i + stride] = row[i] - row[i + stride];
        row[i] = sum;
      }
    }
  }
}

// fp32(1 / sqrt(D)): makes the matrix a rotation.
constexpr float hadamard_unit(std::int64_t dim) { return dim == 64 ? 0x1p-3F : 0x1.6a09e6p-4F; }

// The square of the distance between two levels of a 2-bit sketch is 8122/8192 of the mean square
// of the entries: the distance of the uniform quantiser of four levels that loses least of a normal
// distribution.
inline constexpr std::int64_t kLevelSquare = 8122;
inline constexpr std::int64_t kLevelSquareOf = 8192;

// fp32(sqrt(8122/8192) 2^-9 / sqrt(D)).
constexpr float level_unit(std::int64_t dim) {
  return dim == 64 ? 0x1.fdceccp-13F : 0x1.687d12p-13F;
}

// Where the codes of a rotated key change: entry t has code 3 from t = above on, 2 from 0, 1 beyond
// t = below, and 0 from there down.
struct LevelBounds {
  std::int32_t above;
  std::int32_t below;

  [[nodiscard]] constexpr unsigned code(std::int32_t t) const {
    return static_cast<unsigned>(t > below) + static_cast<unsigned>(t >= 0) +
           static_cast<unsigned>(t >= above);
  }
};

// The bounds of a key whose elements, in units of 2^-9, have the sum of squares S: code 3 where
// 8192 t^2 >= 8122 S, code 0 where 8192 t^2 > 8122 S. `guess` is about sqrt(8122/8192 S).
constexpr LevelBounds level_bounds(std::int64_t sum_squares, std::int64_t guess) {
  const std::int64_t outer = kLevelSquare * sum_squares;
  const auto square = [](std::int64_t t) { return kLevelSquareOf * t * t; };
  while (square(guess) < outer) {
    ++guess;
  }
  while (guess > 1 && square(guess - 1) >= outer) {
    --guess;
  }
  // A key of zeros has S = 0 and codes 2: no t of it reaches 1.
  const std::int64_t above = guess > 0 ? guess : 1;
  const std::int64_t below = square(above) > outer ? above : above + 1;
  return {static_cast<std::int32_t>(above), static_cast<std::int32_t>(-below)};
}

// Keys.

// Writes the codes [sketch_code_bytes] and the scales [sketch_scale_bytes] of the e4m3 key
// scale * element.
void encode_sketch(int sketch, const std::uint8_t* element, float scale, std::int64_t dim,
                   std::uint8_t* codes, std::uint8_t* scales);

// What a key's sketch stands for: entry d is the bf16 number out[d] times the factor that is
// returned, which is NaN if the whole key is. The entries of a 2-bit sketch are rotated.
float decode_sketch(int sketch, const std::uint8_t* codes, const std::uint8_t* scales,
                    std::int64_t dim, std::uint16_t* out);

// The same for a key that has no sketch yet.
float sketched_key(int sketch, const std::uint8_t* element, float scale, std::int64_t dim,
                   std::uint16_t* out);

// Rows that score a rotated sketch.

// Rotates a row of any dtype: e4m3 in exact integers, others in fp32. All entries are NaN if an
// e4m3 element is.
void rotate(const void* row, DType dtype, std::int64_t dim, float* out);

// Rounds a rotated head to e4m3 and returns its scale, max / 448; 0, with entries 0, for a row of
// zeros. A row that is not finite becomes NaN, with scale 1.
float round_to_e4m3(const float* row, std::int64_t dim, std::uint8_t* out);

}  // namespace misa
