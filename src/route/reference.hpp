// SPDX-License-Identifier: Apache-2.0
// Routing: what each head is worth to a query, and the linear row that stands for the heads that
// are not routed.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/row.hpp"

namespace misa::reference {

// The sample S: positions 0, s, 2s, … below n.
std::vector<std::int64_t> sample_positions(std::int64_t n);

// Least-squares fit of max(0, x) by intercept + slope * x.
struct Fit {
  double slope;      // p; 0 where all x are equal
  double intercept;  // a
  double rms;        // of max(0, x) - a - p x
};
Fit fit_relu(std::span<const double> x);

// E[j] = (1/M) sum over blocks of |w_j * max(0, q_j . mean_b)|.
std::vector<double> pooled_energy(const Row& row, const std::vector<std::vector<double>>& means);

// G[j] = |w_j| * (rms of the fit + gamma * |q_j| * kappa * (1 - p_j)), over the sample.
std::vector<double> nonlinearity(const Row& row);

// |w_j| * standard deviation of max(0, q_j . k) over the sample.
std::vector<double> dispersion(const Row& row);

// w_j * max(0, q_j . k) for the last key that the query sees.
std::vector<double> self_score(const Row& row);

// |q_j|
std::vector<double> query_norm(const Row& row);

// |w_j|
std::vector<double> weight_magnitude(const Row& row);

// sum over j not in `heads` of w_j p_j q_j: [D]. fp32, because that is what callers are given.
std::vector<float> residual_row(const Row& row, std::span<const std::int32_t> heads);

// The residual row that scores: rounded to e4m3 with scale max|row| / 448 where keys are e4m3. All
// of it is fp32 arithmetic, so that every backend rounds the same row to the same values. A row
// that is not finite is left as it is.
std::vector<double> rounded_residual(std::span<const float> residual, DType k_dtype);

}  // namespace misa::reference
