// SPDX-License-Identifier: Apache-2.0
// How far an fp32 backend may be from the reference, by norms and the number of roundings.
//
// A sum of n products of magnitude sum |a_i b_i| = A, in any order and with or without fused
// operations, is off by at most gamma_n A, gamma_n = n u / (1 - n u), u = 2^-24, plus the
// error of underflow: hardware that flushes subnormal operands and results loses at most 2^-126 per
// step. It follows:
//
//   dot      e_j = gamma_{D+4} sum_d |q_d k_d| + underflow                      (+4: see kDotExtra)
//   head     max(0, x) is 1-Lipschitz; where x + e <= 0 it is exactly 0
//   score    sum_j |w_j| e_j over the heads that can fire, and gamma_{|J|+6} of the terms
//   mean     gamma_{64 + B/64 + 4} of the mean of |k|: tokens, pages, scale and division
//   fit      see fit_bounds
//
// A tensor core adds the K products of a step and the running sum at once: it aligns them to the
// largest and truncates them to multiples of `unit` times it, so a step is off by (K + 1) unit m,
// where m is the larger of the sums of positive and of negative products, which no product or
// running sum exceeds. A dot product takes D / K steps; this error is added to the roundings above.
//
// Where a magnitude could overflow fp32, or an operand is infinite, any value is permitted.
#pragma once

#include <cstdint>
#include <limits>
#include <span>
#include <string_view>
#include <vector>

#include "core/problem.hpp"
#include "indexers/reference.hpp"

namespace misa::test {

// The interval in which a backend's value has to lie. A certain NaN is {-inf, -inf}, because NaN
// ranks below every number; {-inf, inf} permits any value.
struct Interval {
  double low;
  double high;

  [[nodiscard]] bool contains(double value) const;
};

// How a backend adds up products: with one rounding each, or in the steps of a tensor core.
struct Products {
  std::int64_t step = 1;  // K
  double unit = 0;
  double weights = std::numeric_limits<double>::infinity();  // weights below this do not overflow
};

struct Arithmetic {
  Products score;
  Products rerank;
  Products route;  // of routing, the block filter and the residual row
};

// The arithmetic of a backend.
Arithmetic arithmetic_of(std::string_view backend, const IndexerConfig& config, const Queries& q,
                         DType k_dtype);

// A row of the reference, and what else the intervals depend on.
struct BoundedRow {
  reference::Row row;
  std::vector<double> k_magnitude;  // [n, D] |k|
  std::vector<double> k_scale;      // [n]
  DType k_dtype;
  Arithmetic arithmetic;
};

BoundedRow bounded_row(const Problem& problem, std::int64_t t, const Arithmetic& arithmetic = {});

// [n] scores of the given heads and residual row.
std::vector<Interval> score_intervals(const BoundedRow& row, const IndexerConfig& config,
                                      const reference::Routed& routed);

// [n] scores of all heads.
std::vector<Interval> all_head_intervals(const BoundedRow& row);

// [ceil(n / filter_block)] block scores.
std::vector<Interval> block_intervals(const BoundedRow& row, std::int64_t block);

// [H] the values by which a router ranks heads.
std::vector<Interval> head_intervals(const BoundedRow& row, const IndexerConfig& config);

// [D] the residual row for the given heads.
std::vector<Interval> residual_intervals(const BoundedRow& row,
                                         std::span<const std::int32_t> heads);

}  // namespace misa::test
