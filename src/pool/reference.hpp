// SPDX-License-Identifier: Apache-2.0
// Block means: mean[b] is the mean of the keys of block b that the query sees.
#pragma once

#include <cstdint>
#include <vector>

#include "core/row.hpp"

namespace misa::reference {

// The means [ceil(n / block)][D]; `block` is a multiple of 64.
std::vector<std::vector<double>> block_means(const Row& row, std::int64_t block);

}  // namespace misa::reference
