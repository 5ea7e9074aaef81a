// SPDX-License-Identifier: Apache-2.0
// Tables for a terminal.
#pragma once

#include <string>
#include <vector>

namespace misa::cli {

using Cells = std::vector<std::string>;

// At least one row, all of as many cells. Columns are as wide as their widest cell; the first is
// set to the left, the others to the right.
std::string aligned(const std::vector<Cells>& rows);

}  // namespace misa::cli
