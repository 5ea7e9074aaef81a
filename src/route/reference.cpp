// SPDX-License-Identifier: Apache-2.0
#include "route/reference.hpp"

#include <algorithm>
#include <cmath>

#include "core/recipe.hpp"
#include "core/sketch.hpp"

namespace misa::reference {
namespace {

// x[i] = q_j . k of the i-th sampled position.
std::vector<double> sampled_dots(const Row& row, std::int64_t j) {
  std::vector<double> x;
  for (const std::int64_t position : sample_positions(row.length)) {
    x.push_back(dot(row.query(j), row.key(position)));
  }
  return x;
}

double norm(std::span<const double> v) { return std::sqrt(dot(v, v)); }

double mean(std::span<const double> v) {
  double sum = 0;
  for (const double value : v) {
    sum += value;
  }
  return sum / static_cast<double>(v.size());
}

double rms(std::span<const double> v) {
  return std::sqrt(dot(v, v) / static_cast<double>(v.size()));
}

std::vector<double> relu_of(std::span<const double> x) {
  std::vector<double> r;
  for (const double value : x) {
    r.push_back(relu(value));
  }
  return r;
}

// The values less their mean.
std::vector<double> centred(std::span<const double> v) {
  const double centre = mean(v);
  std::vector<double> out;
  for (const double value : v) {
    out.push_back(value - centre);
  }
  return out;
}

}  // namespace

std::vector<std::int64_t> sample_positions(std::int64_t n) {
  std::vector<std::int64_t> positions;
  for (std::int64_t position = 0; position < n; position += sample_stride(n)) {
    positions.push_back(position);
  }
  return positions;
}

Fit fit_relu(std::span<const double> x) {
  const std::vector<double> r = relu_of(x);
  if (std::all_of(x.begin(), x.end(), [&](double value) { return value == x[0]; })) {
    return {0, mean(r), 0};
  }
  const std::vector<double> dx = centred(x);
  const double slope = dot(dx, centred(r)) / dot(dx, dx);
  const double intercept = mean(r) - slope * mean(x);
  std::vector<double> rest;
  for (std::size_t i = 0; i < x.size(); ++i) {
    rest.push_back(r[i] - intercept - slope * x[i]);
  }
  return {slope, intercept, rms(rest)};
}

std::vector<double> pooled_energy(const Row& row, const std::vector<std::vector<double>>& means) {
  std::vector<double> energy;
  for (std::int64_t j = 0; j < row.heads; ++j) {
    double sum = 0;
    for (const std::vector<double>& block_mean : means) {
      sum += std::abs(row.w[j] * relu(dot(row.query(j), block_mean)));
    }
    energy.push_back(sum / static_cast<double>(means.size()));
  }
  return energy;
}

std::vector<double> nonlinearity(const Row& row) {
  std::vector<double> entries;
  for (const std::int64_t position : sample_positions(row.length)) {
    const auto key = row.key(position);
    entries.insert(entries.end(), key.begin(), key.end());
  }
  const double kappa = rms(entries);
  std::vector<double> value;
  for (std::int64_t j = 0; j < row.heads; ++j) {
    const Fit fit = fit_relu(sampled_dots(row, j));
    const double chance = kFireChance * norm(row.query(j)) * kappa * (1 - fit.slope);
    value.push_back(std::abs(row.w[j]) * (fit.rms + chance));
  }
  return value;
}

std::vector<double> dispersion(const Row& row) {
  std::vector<double> value;
  for (std::int64_t j = 0; j < row.heads; ++j) {
    value.push_back(std::abs(row.w[j]) * rms(centred(relu_of(sampled_dots(row, j)))));
  }
  return value;
}

std::vector<double> self_score(const Row& row) {
  std::vector<double> value;
  for (std::int64_t j = 0; j < row.heads; ++j) {
    value.push_back(row.w[j] * relu(dot(row.query(j), row.key(row.length - 1))));
  }
  return value;
}

std::vector<double> query_norm(const Row& row) {
  std::vector<double> value;
  for (std::int64_t j = 0; j < row.heads; ++j) {
    value.push_back(norm(row.query(j)));
  }
  return value;
}

std::vector<double> weight_magnitude(const Row& row) {
  std::vector<double> value;
  for (const double w : row.w) {
    value.push_back(std::abs(w));
  }
  return value;
}

std::vector<float> residual_row(const Row& row, std::span<const std::int32_t> heads) {
  std::vector<double> sum(static_cast<std::size_t>(row.dim));
  for (std::int64_t j = 0; j < row.heads; ++j) {
    if (std::find(heads.begin(), heads.end(), j) != heads.end()) {
      continue;
    }
    const double slope = fit_relu(sampled_dots(row, j)).slope;
    for (std::int64_t d = 0; d < row.dim; ++d) {
      sum[d] += row.w[j] * slope * row.query(j)[d];
    }
  }
  return {sum.begin(), sum.end()};
}

std::vector<double> rounded_residual(std::span<const float> residual, DType k_dtype) {
  const bool finite =
      std::all_of(residual.begin(), residual.end(), [](float v) { return std::isfinite(v); });
  if (k_dtype != DType::e4m3 || !finite) {
    return {residual.begin(), residual.end()};
  }
  float largest = 0;
  for (const float value : residual) {
    largest = std::max(largest, std::abs(value));
  }
  const float scale = largest / kE4m3Max;
  std::vector<double> rounded;
  for (const float value : residual) {
    rounded.push_back(scale == 0 ? 0 : double{scale} * e4m3_to_float(float_to_e4m3(value / scale)));
  }
  return rounded;
}

std::vector<double> sketched_residual(std::span<const float> residual, int sketch) {
  std::vector<float> row(residual.begin(), residual.end());
  if (is_rotated(sketch)) {
    rotate(residual.data(), DType::f32, std::ssize(residual), row.data());
  }
  return rounded_residual(row, DType::e4m3);
}

}  // namespace misa::reference
