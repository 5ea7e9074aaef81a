// SPDX-License-Identifier: Apache-2.0
// Routing of the reference: in double precision, a row at a time.
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

// What the heads are worth under a router that ranks them (not `all`, not `fixed`).
std::vector<double> head_values(const Row& row, const IndexerConfig& config);

// Active heads and, with a residual, its row.
Routed route(const Row& row, const IndexerConfig& config);

}  // namespace misa::reference
