// SPDX-License-Identifier: Apache-2.0
// Tables for a terminal.
#pragma once

#include <string>
#include <vector>

namespace misa::cli {

using Cells = std::vector<std::string>;

// Formats one or more rows with equal numbers of cells. The first column is aligned to the left,
// the others to the right.
std::string aligned(const std::vector<Cells>& rows);

}  // namespace misa::cli
