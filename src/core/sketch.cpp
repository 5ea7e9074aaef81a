// SPDX-License-Identifier: Apache-2.0
#include "core/sketch.hpp"

#include <algorithm>
#include <array>
#include <cmath>
#include <limits>

#include "core/problem.hpp"

namespace misa {
namespace {

constexpr float kLargestFp16 = 65504.0F;

// Element by its bits: times 2^9, and its value.
constexpr auto kFixed = [] {
  std::array<std::int32_t, 256> table{};
  for (std::size_t bits = 0; bits < table.size(); ++bits) {
    table[bits] = e4m3_to_fixed(static_cast<std::uint8_t>(bits));
  }
  return table;
}();
constexpr auto kValue = [] {
  std::array<float, 256> table{};
  for (std::size_t bits = 0; bits < table.size(); ++bits) {
    table[bits] = e4m3_to_float(static_cast<std::uint8_t>(bits));
  }
  return table;
}();

bool any_nan(const std::uint8_t* element, std::int64_t dim) {
  bool nan = false;
  for (std::int64_t d = 0; d < dim; ++d) {
    nan |= is_e4m3_nan(element[d]);
  }
  return nan;
}

// Packs codes of `kBits` bits each, the first one in the low bits.
template <int kBits>
void pack_codes(const std::uint8_t* code, std::int64_t count, std::uint8_t* out) {
  constexpr int kCodes = 8 / kBits;
  for (std::int64_t i = 0; i < count / kCodes; ++i) {
    unsigned byte = 0;
    for (int c = 0; c < kCodes; ++c) {
      byte |= static_cast<unsigned>(code[kCodes * i + c]) << (kBits * c);
    }
    out[i] = static_cast<std::uint8_t>(byte);
  }
}

void store_fp16(std::uint16_t value, std::uint8_t* out) {
  out[0] = static_cast<std::uint8_t>(value);
  out[1] = static_cast<std::uint8_t>(value >> 8);
}

std::uint16_t load_fp16(const std::uint8_t* in) {
  return static_cast<std::uint16_t>(in[0] | in[1] << 8);
}

void encode_rotated(const std::uint8_t* element, float scale, std::int64_t dim, std::uint8_t* codes,
                    std::uint8_t* scales) {
  if (any_nan(element, dim) || !std::isfinite(scale)) {
    std::fill_n(codes, sketch_code_bytes(2, dim), std::uint8_t{0});
    store_fp16(kFp16NaN, scales);
    return;
  }
  std::int32_t t[kMaxSketchDim] = {};
  std::int64_t sum_squares = 0;
  const std::int32_t sign = scale < 0 ? -1 : 1;
  for (std::int64_t d = 0; d < dim; ++d) {
    t[d] = sign * kFixed[element[d]];
    sum_squares += std::int64_t{t[d]} * t[d];
  }
  hadamard(t, dim);
  constexpr double kStep = static_cast<double>(kLevelSquare) / kLevelSquareOf;
  const double guess = std::sqrt(kStep * static_cast<double>(sum_squares));
  const LevelBounds bounds = level_bounds(sum_squares, static_cast<std::int64_t>(guess));
  std::uint8_t code[kMaxSketchDim] = {};
  for (std::int64_t d = 0; d < dim; ++d) {
    code[d] = static_cast<std::uint8_t>(bounds.code(t[d]));
  }
  pack_codes<2>(code, dim, codes);
  const float level = std::sqrt(static_cast<float>(sum_squares)) * level_unit(dim);
  store_fp16(float_to_fp16(std::min(kLargestFp16, std::abs(scale) * level)), scales);
}

float decode_rotated(const std::uint8_t* codes, const std::uint8_t* scales, std::int64_t dim,
                     std::uint16_t* out) {
  constexpr std::uint16_t kLevels[4] = {float_to_bf16(-1.5F), float_to_bf16(-0.5F),
                                        float_to_bf16(0.5F), float_to_bf16(1.5F)};
  for (std::int64_t d = 0; d < dim; ++d) {
    out[d] = kLevels[codes[d / 4] >> (2 * (d % 4)) & 3];
  }
  return fp16_to_float(load_fp16(scales));
}

// One group of 32 entries; returns its scale.
std::uint8_t encode_group(const float* k, std::uint8_t* codes) {
  float largest = 0;
  bool finite = true;
  for (std::int64_t d = 0; d < kSketchGroup; ++d) {
    largest = std::max(largest, std::abs(k[d]));
    finite = finite && std::isfinite(k[d]);
  }
  if (!finite || largest == 0) {
    std::fill_n(codes, kSketchGroup / 2, std::uint8_t{0});
    return finite ? std::uint8_t{0} : kUe8m0NaN;
  }
  const std::uint8_t scale = ue8m0_for(largest);
  const float inverse = std::bit_cast<float>((254U - scale) << 23);  // scale is at most 253
  std::uint8_t code[kSketchGroup];
  for (std::int64_t d = 0; d < kSketchGroup; ++d) {
    const unsigned sign = std::bit_cast<std::uint32_t>(k[d]) >> 31 << 3;
    code[d] = static_cast<std::uint8_t>(sign | e2m1_code(std::abs(k[d]) * inverse));
  }
  pack_codes<4>(code, kSketchGroup, codes);
  return scale;
}

void encode_mxfp4(const std::uint8_t* element, float scale, std::int64_t dim, std::uint8_t* codes,
                  std::uint8_t* scales) {
  for (std::int64_t first = 0; first < dim; first += kSketchGroup) {
    float k[kSketchGroup];
    for (std::int64_t d = 0; d < kSketchGroup; ++d) {
      k[d] = scale * kValue[element[first + d]];
    }
    scales[first / kSketchGroup] = encode_group(k, codes + first / 2);
  }
}

float decode_mxfp4(const std::uint8_t* codes, const std::uint8_t* scales, std::int64_t dim,
                   std::uint16_t* out) {
  const std::uint8_t largest = *std::max_element(scales, scales + dim / kSketchGroup);
  for (std::int64_t first = 0; first < dim; first += kSketchGroup) {
    const int below = largest - scales[first / kSketchGroup];
    const float unit = below > kSketchReach ? 0.0F : 1.0F / static_cast<float>(1 << below);
    std::uint16_t values[16];
    for (unsigned code = 0; code < 16; ++code) {
      values[code] = float_to_bf16(unit * e2m1_to_float(code));
    }
    for (std::int64_t d = first; d < first + kSketchGroup; d += 2) {
      out[d] = values[codes[d / 2] & 0xf];
      out[d + 1] = values[codes[d / 2] >> 4];
    }
  }
  return ue8m0_to_float(largest);  // NaN if any group is
}

}  // namespace

void encode_sketch(int sketch, const std::uint8_t* element, float scale, std::int64_t dim,
                   std::uint8_t* codes, std::uint8_t* scales) {
  (is_rotated(sketch) ? encode_rotated : encode_mxfp4)(element, scale, dim, codes, scales);
}

float decode_sketch(int sketch, const std::uint8_t* codes, const std::uint8_t* scales,
                    std::int64_t dim, std::uint16_t* out) {
  return (is_rotated(sketch) ? decode_rotated : decode_mxfp4)(codes, scales, dim, out);
}

float sketched_key(int sketch, const std::uint8_t* element, float scale, std::int64_t dim,
                   std::uint16_t* out) {
  std::uint8_t bytes[kMaxSketchKeyBytes];
  std::uint8_t* scales = bytes + sketch_scale_offset(sketch, dim, 1, 0);
  encode_sketch(sketch, element, scale, dim, bytes, scales);
  return decode_sketch(sketch, bytes, scales, dim, out);
}

void rotate(const void* row, DType dtype, std::int64_t dim, float* out) {
  if (dtype != DType::e4m3) {
    for (std::int64_t d = 0; d < dim; ++d) {
      out[d] = element(row, dtype, d);
    }
    hadamard(out, dim);
    std::for_each_n(out, dim, [&](float& value) { value *= hadamard_unit(dim); });
    return;
  }
  const auto* bytes = static_cast<const std::uint8_t*>(row);
  if (any_nan(bytes, dim)) {
    std::fill_n(out, dim, std::numeric_limits<float>::quiet_NaN());
    return;
  }
  std::int32_t fixed[kMaxSketchDim] = {};
  for (std::int64_t d = 0; d < dim; ++d) {
    fixed[d] = kFixed[bytes[d]];
  }
  hadamard(fixed, dim);
  for (std::int64_t d = 0; d < dim; ++d) {
    out[d] = static_cast<float>(fixed[d]) * kE4m3Unit * hadamard_unit(dim);
  }
}

float round_to_e4m3(const float* row, std::int64_t dim, std::uint8_t* out) {
  float largest = 0;
  bool finite = true;
  for (std::int64_t d = 0; d < dim; ++d) {
    largest = std::max(largest, std::abs(row[d]));
    finite = finite && std::isfinite(row[d]);
  }
  if (!finite) {
    std::fill_n(out, dim, std::uint8_t{0x7f});
    return 1.0F;
  }
  const float scale = largest / kE4m3Max;
  for (std::int64_t d = 0; d < dim; ++d) {
    out[d] = scale > 0 ? float_to_e4m3(row[d] / scale) : std::uint8_t{0};
  }
  return scale;
}

}  // namespace misa
