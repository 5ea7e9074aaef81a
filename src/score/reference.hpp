// SPDX-License-Identifier: Apache-2.0
// score = sum over j in J of w_j * max(0, q_j . k) + residual . k
#pragma once

#include <cstdint>
#include <span>

#include "core/row.hpp"

namespace misa::reference {

// `key` is a key or a block mean; `heads` are in ascending order; an empty residual adds nothing.
double score(const Row& row, std::span<const double> key, std::span<const std::int32_t> heads,
             std::span<const double> residual = {});

}  // namespace misa::reference
