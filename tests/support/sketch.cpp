// SPDX-License-Identifier: Apache-2.0
#include "support/sketch.hpp"

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstddef>
#include <limits>

namespace misa::test {
namespace {

constexpr double kNaN = std::numeric_limits<double>::quiet_NaN();

double e4m3_value(std::uint8_t bits) {
  const int exponent = bits >> 3 & 0xf;
  const int mantissa = bits & 7;
  if (exponent == 15 && mantissa == 7) {
    return kNaN;
  }
  const double magnitude =
      exponent == 0 ? std::ldexp(mantissa, -9) : std::ldexp(8 + mantissa, exponent - 10);
  return (bits & 0x80) != 0 ? -magnitude : magnitude;
}

// The index of the value that is nearest to x; the even index if two are.
std::size_t nearest(double x, const std::vector<double>& values) {
  std::size_t best = 0;
  for (std::size_t i = 1; i < values.size(); ++i) {
    const double distance = std::abs(x - values[i]);
    const double least = std::abs(x - values[best]);
    if (distance < least || (distance == least && i % 2 == 0)) {
      best = i;
    }
  }
  return best;
}

// x rounded to the multiple of 2^exponent that is nearest, ties to even.
double rounded_to(double x, int exponent) {
  return std::ldexp(std::nearbyint(std::ldexp(x, -exponent)), exponent);
}

double to_fp16(double x) { return x == 0 ? 0 : rounded_to(x, std::max(std::ilogb(x), -14) - 10); }

std::uint16_t fp16_bits(double x) {
  if (std::isnan(x)) {
    return 0x7fff;
  }
  const int exponent = x < 0x1p-14 ? -14 : std::ilogb(x);
  const auto units = static_cast<int>(std::ldexp(x, 10 - exponent));
  return static_cast<std::uint16_t>((exponent + 14) * 1024 + units);
}

constexpr std::size_t kDim = 128;  // the matrix of a smaller D is its upper left corner

// Entry (i, j) is -1 where i and j share an odd number of bits.
using Matrix = std::array<std::array<std::int32_t, kDim>, kDim>;
const Matrix kMatrix = [] {
  Matrix matrix{};
  for (std::size_t i = 0; i < kDim; ++i) {
    for (std::size_t j = 0; j < kDim; ++j) {
      matrix[i][j] = std::popcount(i & j) % 2 == 0 ? 1 : -1;
    }
  }
  return matrix;
}();

// Integers times the matrix.
std::vector<std::int32_t> times_matrix(const std::vector<std::int32_t>& a) {
  std::vector<std::int32_t> t;
  for (std::size_t i = 0; i < a.size(); ++i) {
    std::int32_t sum = 0;
    for (std::size_t j = 0; j < a.size(); ++j) {
      sum += kMatrix[i][j] * a[j];
    }
    t.push_back(sum);
  }
  return t;
}

// The same in fp32, in the order of butterflies of stride 1, 2, 4, …: the last one joins halves.
std::vector<float> butterflies(const std::vector<float>& x) {
  if (x.size() == 1) {
    return x;
  }
  const auto half = static_cast<std::ptrdiff_t>(x.size() / 2);
  const std::vector<float> low = butterflies({x.begin(), x.begin() + half});
  const std::vector<float> high = butterflies({x.begin() + half, x.end()});
  std::vector<float> out;
  for (std::ptrdiff_t i = 0; i < half; ++i) {
    out.push_back(low[i] + high[i]);
  }
  for (std::ptrdiff_t i = 0; i < half; ++i) {
    out.push_back(low[i] - high[i]);
  }
  return out;
}

SketchedKey rotated_key(const std::uint8_t* element, float scale, std::int64_t dim) {
  std::vector<std::int32_t> a;
  std::int64_t squares = 0;  // t^2 <= D S < 2^50, so 8192 t^2 fits
  bool nan = !std::isfinite(scale);
  for (std::int64_t d = 0; d < dim; ++d) {
    const double value = e4m3_value(element[d]) * 512;
    nan = nan || std::isnan(value);
    a.push_back(std::isnan(value) ? 0 : static_cast<std::int32_t>(scale < 0 ? -value : value));
    squares += std::int64_t{a.back()} * a.back();
  }
  const auto level = static_cast<float>(std::sqrt(8122.0L / 8192.0L) / 512 /
                                        std::sqrt(static_cast<long double>(dim)));
  const float root = std::sqrt(static_cast<float>(squares));
  const float step = std::abs(scale) * (root * level);
  SketchedKey key{std::vector<std::uint8_t>(static_cast<std::size_t>(dim / 4)), {}, {}, 0};
  key.factor = nan ? kNaN : to_fp16(std::min(step, 65504.0F));
  key.scales = {static_cast<std::uint8_t>(fp16_bits(key.factor) & 0xff),
                static_cast<std::uint8_t>(fp16_bits(key.factor) >> 8)};
  const std::vector<std::int32_t> rotated = times_matrix(a);
  for (std::int64_t i = 0; i < dim; ++i) {
    const std::int64_t t = rotated[i];
    int code = t >= 0 ? 2 : 1;
    if (t >= 0 && squares > 0 && 8192 * t * t >= 8122 * squares) {
      code = 3;
    } else if (t < 0 && 8192 * t * t > 8122 * squares) {
      code = 0;
    }
    code = nan ? 0 : code;
    key.codes[i / 4] = static_cast<std::uint8_t>(key.codes[i / 4] + (code << (2 * (i % 4))));
    key.value.push_back(code - 1.5);
  }
  return key;
}

SketchedKey mxfp4_key(const std::uint8_t* element, float scale, std::int64_t dim) {
  const std::vector<double> magnitudes{0, 0.5, 1, 1.5, 2, 3, 4, 6};
  SketchedKey key{std::vector<std::uint8_t>(static_cast<std::size_t>(dim / 2)),
                  {},
                  std::vector<double>(static_cast<std::size_t>(dim)),
                  0};
  for (std::int64_t first = 0; first < dim; first += 32) {
    std::vector<float> k;
    float largest = 0;
    bool finite = true;
    for (std::int64_t d = first; d < first + 32; ++d) {
      k.push_back(scale * static_cast<float>(e4m3_value(element[d])));
      largest = std::max(largest, std::abs(k.back()));
      finite = finite && std::isfinite(k.back());
    }
    if (!finite) {
      key.scales.push_back(0xff);
      continue;
    }
    int exponent = -127;
    while (largest > std::ldexp(6.0, exponent)) {
      ++exponent;
    }
    key.scales.push_back(static_cast<std::uint8_t>(exponent + 127));
    for (std::int64_t i = 0; largest > 0 && i < 32; ++i) {
      const std::size_t code = nearest(std::ldexp(std::abs(double{k[i]}), -exponent), magnitudes);
      const int nibble = static_cast<int>(code) + (std::signbit(k[i]) ? 8 : 0);
      key.codes[(first + i) / 2] =
          static_cast<std::uint8_t>(key.codes[(first + i) / 2] + (nibble << (i % 2 == 0 ? 0 : 4)));
      key.value[first + i] = std::copysign(magnitudes[code], k[i]);
    }
  }
  const int largest = *std::max_element(key.scales.begin(), key.scales.end());
  for (std::int64_t d = 0; d < dim; ++d) {
    const int below = largest - key.scales[d / 32];
    key.value[d] = below > 14 ? 0 : std::ldexp(key.value[d], -below);
  }
  key.factor = largest == 0xff ? kNaN : std::ldexp(1.0, largest - 127);
  return key;
}

}  // namespace

SketchedKey brute_force_sketch(int sketch, const std::uint8_t* element, float scale,
                               std::int64_t dim) {
  return sketch == 2 ? rotated_key(element, scale, dim) : mxfp4_key(element, scale, dim);
}

std::vector<float> brute_force_rotated(const void* row, DType dtype, std::int64_t dim) {
  const auto unit = static_cast<float>(1 / std::sqrt(static_cast<long double>(dim)));
  std::vector<float> out;
  if (dtype == DType::e4m3) {
    std::vector<std::int32_t> a;
    for (std::int64_t d = 0; d < dim; ++d) {
      const double value = e4m3_value(static_cast<const std::uint8_t*>(row)[d]) * 512;
      if (std::isnan(value)) {
        return std::vector<float>(static_cast<std::size_t>(dim), std::nanf(""));
      }
      a.push_back(static_cast<std::int32_t>(value));
    }
    for (const std::int32_t t : times_matrix(a)) {
      out.push_back(static_cast<float>(t) / 512 * unit);
    }
    return out;
  }
  std::vector<float> values;
  for (std::int64_t d = 0; d < dim; ++d) {
    values.push_back(element(row, dtype, d));
  }
  for (const float value : butterflies(values)) {
    out.push_back(value * unit);
  }
  return out;
}

RoundedRow brute_force_rounded(const std::vector<float>& row) {
  if (!std::all_of(row.begin(), row.end(), [](float x) { return std::isfinite(x); })) {
    return {std::vector<double>(row.size(), kNaN), 1};
  }
  std::vector<double> values;
  for (int bits = 0; bits < 0x7f; ++bits) {
    values.push_back(e4m3_value(static_cast<std::uint8_t>(bits)));
  }
  float largest = 0;
  for (const float x : row) {
    largest = std::max(largest, std::abs(x));
  }
  RoundedRow out{{}, largest / 448};
  for (const float x : row) {
    const float ratio = out.scale == 0 ? 0 : x / out.scale;
    out.value.push_back(std::copysign(values[nearest(std::abs(double{ratio}), values)], ratio));
  }
  return out;
}

BoundedRow bounded_sketched_row(const Problem& problem, std::int64_t t,
                                const Arithmetic& arithmetic) {
  BoundedRow bounded = bounded_row(problem, t, arithmetic);
  const int sketch = problem.config.sketch;
  const std::int64_t dim = bounded.row.dim;
  for (std::int64_t position = 0; position < bounded.row.length; ++position) {
    const Key key = problem.key(t, position);
    const SketchedKey sketched =
        brute_force_sketch(sketch, reinterpret_cast<const std::uint8_t*>(key.data), key.scale, dim);
    bounded.k_scale[position] = sketched.factor;
    for (std::int64_t d = 0; d < dim; ++d) {
      const double value = sketched.factor * sketched.value[d];
      bounded.row.k[position * dim + d] = value;
      bounded.k_magnitude[position * dim + d] = std::abs(value);
    }
  }
  for (std::int64_t j = 0; sketch == 2 && j < bounded.row.heads; ++j) {
    const RoundedRow head =
        brute_force_rounded(brute_force_rotated(problem.query(t, j), problem.q.dtype, dim));
    std::copy(head.value.begin(), head.value.end(), bounded.row.q.begin() + j * dim);
    bounded.row.w[j] = problem.weight(t, j) * head.scale;
  }
  return bounded;
}

}  // namespace misa::test
