// SPDX-License-Identifier: Apache-2.0
#include "support/tolerance.hpp"

#include <algorithm>
#include <cmath>
#include <limits>
#include <numeric>

#include "core/recipe.hpp"
#include "pool/reference.hpp"
#include "route/reference.hpp"

namespace misa::test {
namespace {

using reference::Row;

constexpr double kInfinity = std::numeric_limits<double>::infinity();
constexpr double kTiny = 0x1p-126;     // the largest error of one underflow
constexpr double kSqrtTiny = 0x1p-63;  // the same after a square root
constexpr double kRange = 0x1p126;     // sums below this do not overflow, whatever their order
constexpr double kMaxE4m3 = kE4m3Max;  // the largest element of an e4m3 key, unscaled
// Roundings of a dot product beside its D additions: the product, the key's scale before or after,
// and the three bf16 parts of an fp32 residual row.
constexpr std::int64_t kDotExtra = 4;
// Roundings of a score beside its additions: weight, scale, the residual row's parts and scale.
constexpr std::int64_t kScoreExtra = 6;

constexpr Interval kUnknown{-kInfinity, kInfinity};
constexpr Interval kCertainNaN{-kInfinity, -kInfinity};

double gamma(std::int64_t roundings) {
  const double nu = static_cast<double>(roundings) * 0x1p-24;
  return nu / (1 - nu);
}

bool any_infinite(std::span<const double> v) {
  return std::any_of(v.begin(), v.end(), [](double x) { return std::isinf(x); });
}

// A key or a block mean.
struct BoundedKey {
  std::span<const double> value;
  std::span<const double> magnitude;
  double scale;            // infinite if the scale of any key in the mean is
  std::int64_t roundings;  // in the computation of its elements
};

// Adds up terms weight * x. The interval is kCertainNaN if a term certainly is NaN, and kUnknown if
// a term may have any value.
class Sum {
 public:
  Sum(DType k_dtype, const Products& products)
      : e4m3_(k_dtype == DType::e4m3), products_(products) {}

  // weight * max(0, q . k), or weight * (q . k) if linear.
  void add(double weight, std::span<const double> q, const BoundedKey& key, bool linear) {
    double x = 0;
    double terms = 0;
    double positive = 0;
    double negative = 0;
    double q_entries = 0;
    double k_entries = 0;
    for (std::size_t d = 0; d < q.size(); ++d) {
      x += q[d] * key.value[d];
      (q[d] * key.value[d] > 0 ? positive : negative) += std::abs(q[d]) * key.magnitude[d];
      terms += std::abs(q[d]) * key.magnitude[d];
      q_entries += std::abs(q[d]);
      k_entries += key.magnitude[d];
    }
    if (!std::isfinite(weight * key.scale) || !std::isfinite(x) || !std::isfinite(terms)) {
      const bool infinite =
          std::isinf(key.scale) || std::isinf(weight) || any_infinite(q) || any_infinite(key.value);
      (infinite ? unknown_ : nan_) = true;
      return;
    }
    const double scale = std::max(1.0, std::abs(key.scale));
    const double range = scale * std::max(terms, e4m3_ ? q_entries * kMaxE4m3 : 0);
    if (range * std::max(1.0, std::abs(weight)) > kRange || std::abs(weight) >= products_.weights) {
      unknown_ = true;
      return;
    }
    if (terms == 0) {
      return;
    }
    const auto dim = static_cast<std::int64_t>(q.size());
    const double underflow = kTiny * scale * (static_cast<double>(dim) + q_entries + k_entries);
    const double error = gamma(dim + kDotExtra + key.roundings) * terms +
                         steps_error(dim) * std::max(positive, negative) + underflow;
    if (!linear && x + error <= 0) {
      return;
    }
    const double clipped = linear ? x : reference::relu(x);
    value_ += weight * clipped;
    error_ += std::abs(weight) * error + kTiny * scale;
    terms_ += std::abs(weight) * (std::abs(clipped) + error);
    ++count_;
  }

  [[nodiscard]] Interval interval() const {
    if (unknown_ || terms_ > kRange) {
      return kUnknown;
    }
    if (nan_) {
      return kCertainNaN;
    }
    const double error = error_ + gamma(count_ + kScoreExtra) * terms_;
    return {value_ - error, value_ + error};
  }

 private:
  // The error of a dot product on a tensor core, relative to the magnitude of its terms. Later
  // steps truncate the error of a step too.
  [[nodiscard]] double steps_error(std::int64_t dim) const {
    const auto steps = static_cast<double>((dim + products_.step - 1) / products_.step);
    const double error = steps * static_cast<double>(products_.step + 1) * products_.unit;
    return error / (1 - error);
  }

  bool e4m3_;
  Products products_;
  bool unknown_ = false;
  bool nan_ = false;
  double value_ = 0;
  double error_ = 0;
  double terms_ = 0;
  std::int64_t count_ = 0;
};

BoundedKey key_at(const BoundedRow& bounded, std::int64_t position) {
  const auto dim = static_cast<std::size_t>(bounded.row.dim);
  return {bounded.row.key(position),
          std::span(bounded.k_magnitude).subspan(static_cast<std::size_t>(position) * dim, dim),
          bounded.k_scale[position], 0};
}

std::vector<std::int32_t> all_heads(const Row& row) {
  std::vector<std::int32_t> heads(static_cast<std::size_t>(row.heads));
  std::iota(heads.begin(), heads.end(), 0);
  return heads;
}

Interval score_interval(const BoundedRow& bounded, const BoundedKey& key, const Products& products,
                        std::span<const std::int32_t> heads, std::span<const double> residual) {
  Sum sum(bounded.k_dtype, products);
  for (const std::int32_t j : heads) {
    sum.add(bounded.row.w[j], bounded.row.query(j), key, false);
  }
  if (!residual.empty()) {
    sum.add(1, residual, key, true);
  }
  return sum.interval();
}

// Means of the keys and of their magnitudes, a block at a time.
struct BoundedMeans {
  std::vector<std::vector<double>> value;
  std::vector<std::vector<double>> magnitude;
  std::vector<double> scale;
  std::int64_t block;

  [[nodiscard]] BoundedKey at(std::size_t b) const {
    return {value[b], magnitude[b], scale[b], kPageSize + block / kPageSize + 4};
  }
};

BoundedMeans bounded_means(const BoundedRow& bounded, std::int64_t block) {
  Row magnitudes = bounded.row;
  magnitudes.k = bounded.k_magnitude;
  BoundedMeans means{reference::block_means(bounded.row, block),
                     reference::block_means(magnitudes, block),
                     {},
                     block};
  for (std::int64_t first = 0; first < bounded.row.length; first += block) {
    double scale = 1;
    for (std::int64_t s = first; s < std::min(first + block, bounded.row.length); ++s) {
      scale = std::max(scale, std::abs(bounded.k_scale[s]));
    }
    // The sum over a block is larger than its mean.
    means.scale.push_back(scale * static_cast<double>(block));
  }
  return means;
}

Interval magnitude_of(Interval value) {
  if (value.low == -kInfinity) {
    return value;
  }
  const double largest = std::max(std::abs(value.low), std::abs(value.high));
  const bool spans_zero = value.low < 0 && value.high > 0;
  return {spans_zero ? 0 : std::min(std::abs(value.low), std::abs(value.high)), largest};
}

Interval widen(double value, double error) { return {value - error, value + error}; }

// A fit of max(0, x) over the sample and how far an fp32 fit may be from it.
//
// Let delta be the rms of the error of x: the errors of the dot products, and gamma_{n+8} max|x|
// for the centring. Slopes lie in [0, 1], for max(0, x) is monotone and 1-Lipschitz, so moments
// change by at most 2 |dx| delta + delta^2 each, and with t = delta / std(x) the slope by
// (4 t + 2 t^2) / (1 - t)^2 <= 6 t where t <= 1/8; for larger t it may be anything in [-1, 2]. The
// rms of the residuals is a distance: it changes by 2 delta for the data and (6 t) std(x) for the
// slope, 8 delta in all; where t > 1/8 each of its terms is below 27 delta.
struct FitBounds {
  bool unknown = false;
  bool nan = false;
  reference::Fit fit{};
  double delta = 0;
  double slope_error = 0;
  double rms_error = 0;
  double spread = 0;  // standard deviation of max(0, x)
};

FitBounds fit_bounds(const BoundedRow& bounded, std::int64_t j) {
  const auto positions = reference::sample_positions(bounded.row.length);
  FitBounds bounds;
  std::vector<double> x;
  double squares = 0;
  double largest = 0;
  bool same_keys = true;
  const auto first_key = bounded.row.key(0);
  for (const std::int64_t position : positions) {
    const BoundedKey key = key_at(bounded, position);
    Sum sum(bounded.k_dtype, bounded.arithmetic.route);
    sum.add(1, bounded.row.query(j), key, true);
    const Interval interval = sum.interval();
    bounds.unknown = bounds.unknown || interval.high == kInfinity;
    bounds.nan = bounds.nan || interval.high == -kInfinity;
    x.push_back(reference::dot(bounded.row.query(j), key.value));
    const double error = (interval.high - interval.low) / 2;
    squares += error * error;
    largest = std::max(largest, std::abs(x.back()) + error);
    same_keys = same_keys && std::equal(first_key.begin(), first_key.end(), key.value.begin());
  }
  const auto count = static_cast<double>(x.size());
  bounds.unknown = bounds.unknown || largest * largest * count > kRange;
  if (bounds.unknown || bounds.nan) {
    return bounds;
  }
  bounds.fit = reference::fit_relu(x);
  if (same_keys || largest == 0) {
    return bounds;  // every backend computes equal x from equal keys
  }
  const double mean = std::accumulate(x.begin(), x.end(), 0.0) / count;
  double mean_relu = 0;
  for (const double value : x) {
    mean_relu += reference::relu(value) / count;
  }
  double variance = 0;
  double variance_relu = 0;
  for (const double value : x) {
    variance += (value - mean) * (value - mean) / count;
    variance_relu += std::pow(reference::relu(value) - mean_relu, 2) / count;
  }
  bounds.spread = std::sqrt(variance_relu);
  bounds.delta = std::sqrt(squares / count) + gamma(std::ssize(x) + 8) * largest + kSqrtTiny;
  const double t = bounds.delta / std::sqrt(variance);
  const bool resolved = t <= 1.0 / 8;
  bounds.slope_error = resolved ? 6 * t : 2;
  bounds.rms_error = (resolved ? 8 : 27) * bounds.delta;
  return bounds;
}

double norm(std::span<const double> v) { return std::sqrt(reference::dot(v, v)); }

std::vector<Interval> pooled_intervals(const BoundedRow& bounded, std::int64_t block) {
  const BoundedMeans means = bounded_means(bounded, block);
  const auto blocks = static_cast<std::int64_t>(means.value.size());
  std::vector<Interval> intervals;
  for (std::int64_t j = 0; j < bounded.row.heads; ++j) {
    Interval total{0, 0};
    for (std::int64_t b = 0; b < blocks; ++b) {
      Sum sum(bounded.k_dtype, bounded.arithmetic.route);
      sum.add(bounded.row.w[j], bounded.row.query(j), means.at(b), false);
      const Interval term = magnitude_of(sum.interval());
      total.low += term.low;
      total.high += term.high;
    }
    // An unknown block makes the sum {-inf, inf}; a NaN makes it {-inf, -inf}, or NaN beside an
    // unknown one.
    if (std::isnan(total.high)) {
      total = kUnknown;
    }
    if (total.low != -kInfinity) {
      const double error = gamma(blocks + 2) * total.high;
      total = {(total.low - error) / static_cast<double>(blocks),
               (total.high + error) / static_cast<double>(blocks)};
    }
    intervals.push_back(total);
  }
  return intervals;
}

std::vector<Interval> sampled_intervals(const BoundedRow& bounded, const IndexerConfig& config) {
  const Row& row = bounded.row;
  const auto positions = reference::sample_positions(row.length);
  double sum_squares = 0;
  for (const std::int64_t position : positions) {
    sum_squares += reference::dot(row.key(position), row.key(position));
  }
  const std::int64_t entries = std::ssize(positions) * row.dim;
  const double kappa = std::sqrt(sum_squares / static_cast<double>(entries));
  std::vector<Interval> intervals;
  for (std::int64_t j = 0; j < row.heads; ++j) {
    const FitBounds bounds = fit_bounds(bounded, j);
    const double weight = std::abs(row.w[j]);
    const double q_norm = norm(row.query(j));
    const bool overflows = sum_squares > kRange || q_norm * q_norm > kRange;
    if (bounds.unknown || std::isinf(weight) || overflows) {
      intervals.push_back(kUnknown);
      continue;
    }
    if (bounds.nan || std::isnan(weight)) {
      intervals.push_back(kCertainNaN);
      continue;
    }
    if (config.router == Router::dispersion) {
      const double error = 2 * bounds.delta + gamma(4) * bounds.spread;
      intervals.push_back(widen(weight * bounds.spread, weight * error + kTiny));
      continue;
    }
    const double chance = double{kFireChance} * q_norm * kappa;
    const double chance_error = chance * gamma(entries + 2 * row.dim + 16) +
                                kSqrtTiny * static_cast<double>(row.dim) * (1 + q_norm + kappa);
    const double value = bounds.fit.rms + chance * (1 - bounds.fit.slope);
    const bool zero = value == 0 && bounds.delta == 0 && chance == 0;
    const double error = bounds.rms_error + chance * bounds.slope_error +
                         (1 + bounds.slope_error) * chance_error +
                         gamma(8) * (bounds.fit.rms + chance);
    intervals.push_back(zero ? Interval{0, 0} : widen(weight * value, weight * error + kTiny));
  }
  return intervals;
}

}  // namespace

bool Interval::contains(double value) const {
  return std::isnan(value) ? low == -kInfinity : low <= value && value <= high;
}

Arithmetic arithmetic_of(std::string_view backend, const IndexerConfig& config, const Queries& q,
                         DType k_dtype) {
  constexpr Products kBf16{16, 0x1p-23};  // fp32's ulp of the largest
  if (!backend.starts_with("cuda")) {
    return {};
  }
  if (q.dtype == DType::f32 || k_dtype == DType::f32) {
    return {config.sketch == 2 ? kBf16 : Products{}, {}, {}};  // rows of a rotated sketch are e4m3
  }
  constexpr Products kFp8{32, 0x1p-13, 0x1p103};
  const IndexerConfig effective = effective_config(config, q.heads);
  const std::int64_t rows =
      effective.router == Router::all ? q.heads : effective.heads + (effective.residual ? 1 : 0);
  const bool fp8 =
      backend == "cuda-sm90" && q.dtype == DType::e4m3 && k_dtype == DType::e4m3 && q.dim == 128;
  return {fp8 && rows <= 64 ? kFp8 : kBf16, fp8 && q.heads <= 64 ? kFp8 : kBf16, kBf16};
}

BoundedRow bounded_row(const Problem& problem, std::int64_t t, const Arithmetic& arithmetic) {
  BoundedRow bounded{reference::load_row(problem, t), {}, {}, problem.k_dtype(), arithmetic};
  for (const double value : bounded.row.k) {
    bounded.k_magnitude.push_back(std::abs(value));
  }
  for (std::int64_t position = 0; position < bounded.row.length; ++position) {
    bounded.k_scale.push_back(problem.key(t, position).scale);
  }
  return bounded;
}

std::vector<Interval> score_intervals(const BoundedRow& row, const IndexerConfig& config,
                                      const reference::Routed& routed) {
  const std::vector<double> residual =
      recipe_of(config, row.row.heads, row.row.length).residual
          ? reference::rounded_residual(routed.residual, row.k_dtype)
          : std::vector<double>{};
  std::vector<Interval> intervals;
  for (std::int64_t position = 0; position < row.row.length; ++position) {
    intervals.push_back(
        score_interval(row, key_at(row, position), row.arithmetic.score, routed.heads, residual));
  }
  return intervals;
}

std::vector<Interval> all_head_intervals(const BoundedRow& row) {
  std::vector<Interval> intervals;
  for (std::int64_t position = 0; position < row.row.length; ++position) {
    intervals.push_back(
        score_interval(row, key_at(row, position), row.arithmetic.rerank, all_heads(row.row), {}));
  }
  return intervals;
}

std::vector<Interval> block_intervals(const BoundedRow& row, std::int64_t block) {
  const BoundedMeans means = bounded_means(row, block);
  std::vector<Interval> intervals;
  for (std::size_t b = 0; b < means.value.size(); ++b) {
    intervals.push_back(
        score_interval(row, means.at(b), row.arithmetic.route, all_heads(row.row), {}));
  }
  return intervals;
}

std::vector<Interval> head_intervals(const BoundedRow& row, const IndexerConfig& config) {
  std::vector<Interval> intervals;
  switch (config.router) {
    case Router::pooled: return pooled_intervals(row, config.block);
    case Router::nonlinearity:
    case Router::dispersion: return sampled_intervals(row, config);
    case Router::self:
      for (std::int64_t j = 0; j < row.row.heads; ++j) {
        Sum sum(row.k_dtype, row.arithmetic.route);
        sum.add(row.row.w[j], row.row.query(j), key_at(row, row.row.length - 1), false);
        intervals.push_back(sum.interval());
      }
      break;
    case Router::qnorm:
      for (std::int64_t j = 0; j < row.row.heads; ++j) {
        const double value = norm(row.row.query(j));
        if (std::isnan(value)) {
          intervals.push_back(any_infinite(row.row.query(j)) ? kUnknown : kCertainNaN);
        } else if (value == 0) {
          intervals.push_back({0, 0});
        } else {
          const double error =
              gamma(row.row.dim + 4) * value + kSqrtTiny * static_cast<double>(row.row.dim);
          intervals.push_back(value * value > kRange ? kUnknown : widen(value, error));
        }
      }
      break;
    case Router::weight:
      for (const double weight : row.row.w) {
        intervals.push_back(std::isnan(weight) ? kCertainNaN : widen(std::abs(weight), 0));
      }
      break;
    case Router::all:
    case Router::fixed: break;
  }
  return intervals;
}

std::vector<Interval> residual_intervals(const BoundedRow& row,
                                         std::span<const std::int32_t> heads) {
  const auto dim = static_cast<std::size_t>(row.row.dim);
  std::vector<double> value(dim);
  std::vector<double> error(dim);
  std::vector<double> terms(dim);
  bool unknown = false;
  bool nan = false;
  for (std::int64_t j = 0; j < row.row.heads; ++j) {
    if (std::find(heads.begin(), heads.end(), j) != heads.end()) {
      continue;
    }
    const FitBounds bounds = fit_bounds(row, j);
    const double weight = row.row.w[j];
    unknown = unknown || bounds.unknown || std::isinf(weight);
    nan = nan || bounds.nan || std::isnan(weight);
    for (std::size_t d = 0; d < dim; ++d) {
      const double term = weight * row.row.query(j)[d];
      value[d] += term * bounds.fit.slope;
      error[d] += std::abs(term) * bounds.slope_error +
                  kTiny * (1 + std::abs(weight) + std::abs(row.row.query(j)[d]));
      terms[d] += std::abs(term) * (bounds.fit.slope + bounds.slope_error);
    }
  }
  std::vector<Interval> intervals;
  for (std::size_t d = 0; d < dim; ++d) {
    if (unknown || terms[d] > kRange) {
      intervals.push_back(kUnknown);
    } else {
      intervals.push_back(nan ? kCertainNaN
                              : widen(value[d], error[d] + gamma(row.row.heads + 4) * terms[d]));
    }
  }
  return intervals;
}

}  // namespace misa::test
