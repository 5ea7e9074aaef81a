// SPDX-License-Identifier: Apache-2.0
// Top-k: the k largest values; of equal values the lower index wins; NaN ranks below every number.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

namespace misa::reference {

// The indices of the k largest values, ascending; all if there are no more than k.
std::vector<std::int64_t> top_k(std::span<const double> values, std::int64_t k);

}  // namespace misa::reference
