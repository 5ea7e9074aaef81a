// SPDX-License-Identifier: Apache-2.0
// Routing: the value of each head for a query, by which heads are chosen, and the residual row,
// which replaces the heads that are not.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/row.hpp"

namespace misa::reference {

// The sampled positions S: 0, s, 2s, … below n.
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

// sum of w_j p_j q_j over the heads j not in `heads`: [D]. In fp32, as callers get it.
std::vector<float> residual_row(const Row& row, std::span<const std::int32_t> heads);

// The residual row as keys are scored with it: for e4m3 keys rounded to e4m3 with scale max|row| /
// 448, unless it is not finite. Computed in fp32, so that every backend rounds the same row to the
// same values.
std::vector<double> rounded_residual(std::span<const float> residual, DType k_dtype);

// The same for a sketch of the keys: where that is rotated, the row is rotated before it is
// rounded.
std::vector<double> sketched_residual(std::span<const float> residual, int sketch);

}  // namespace misa::reference
