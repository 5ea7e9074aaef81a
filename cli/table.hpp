// SPDX-License-Identifier: Apache-2.0
// Tables for a terminal, for Markdown and for spreadsheets.
#pragma once

#include <string>
#include <string_view>
#include <vector>

namespace misa::cli {

using Cells = std::vector<std::string>;

// A cell without a value; empty in csv().
inline constexpr std::string_view kNothing = "–";

// Formats one or more rows with equal numbers of cells. The first column is aligned to the left,
// the others to the right.
std::string aligned(const std::vector<Cells>& rows);

// The same as a Markdown table, of which the first row is the head.
std::string markdown(const std::vector<Cells>& rows);

// The same as comma-separated values (RFC 4180, but lines end as on this system).
std::string csv(const std::vector<Cells>& rows);

}  // namespace misa::cli
