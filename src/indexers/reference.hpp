// SPDX-License-Identifier: Apache-2.0
// Routing in the reference, in double precision, one row at a time.
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

// What each head is worth to a router that ranks heads (not `all` or `fixed`).
std::vector<double> head_values(const Row& row, const IndexerConfig& config);

// The active heads and, if the config has a residual, its row.
Routed route(const Row& row, const IndexerConfig& config);

}  // namespace misa::reference
