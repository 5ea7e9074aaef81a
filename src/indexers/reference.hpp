// SPDX-License-Identifier: Apache-2.0
// The indexers in double precision, a row at a time. A row can also be selected for heads and a
// residual row that are given: backends whose near-ties fell differently are compared that way.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/row.hpp"

namespace misa::reference {

// What routing decides for a row.
struct Routed {
  std::vector<std::int32_t> heads;  // J, ascending
  std::vector<float> residual;      // [D] before rounding; empty without residual
};

// Positions, ascending, and the scores that ranked them.
struct Ranked {
  std::vector<std::int64_t> positions;
  std::vector<double> scores;
};

// What the heads are worth under a router that ranks them (not `all`, not `fixed`).
std::vector<double> head_values(const Row& row, const IndexerConfig& config);

Routed route(const Row& row, const IndexerConfig& config);

// The positions that the block filter keeps; all without one.
std::vector<std::int64_t> filter(const Row& row, const IndexerConfig& config);

// Scores the positions with the routed heads and the residual row.
std::vector<double> first_scores(const Row& row, const IndexerConfig& config, DType k_dtype,
                                 const Routed& routed, std::span<const std::int64_t> positions);

Ranked select_row(const Row& row, const IndexerConfig& config, DType k_dtype, const Routed& routed);

}  // namespace misa::reference
