// SPDX-License-Identifier: Apache-2.0
// The page that `compare --html` fills in.
#pragma once

#include <string_view>

namespace misa::cli {

// Contains kReportData once; the JSON of the comparison replaces it.
extern const std::string_view kReportTemplate;
inline constexpr std::string_view kReportData = "\"comparison\"";

}  // namespace misa::cli
