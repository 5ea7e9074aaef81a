// SPDX-License-Identifier: Apache-2.0
#include "table.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <cstddef>
#include <string_view>

namespace misa::cli {

std::string aligned(const std::vector<Cells>& rows) {
  std::vector<std::size_t> widths(rows.front().size());
  // In code points, as in fmt's padding: no cell has a wide or combining character.
  const auto width = [](std::string_view text) {
    return static_cast<std::size_t>(
        std::count_if(text.begin(), text.end(), [](char c) { return (c & 0xc0) != 0x80; }));
  };
  for (const Cells& row : rows) {
    for (std::size_t i = 0; i < row.size(); ++i) {
      widths[i] = std::max(widths[i], width(row[i]));
    }
  }
  std::string text;
  for (const Cells& row : rows) {
    std::string line = fmt::format("  {:<{}}", row.front(), widths.front());
    for (std::size_t i = 1; i < row.size(); ++i) {
      line += fmt::format("   {:>{}}", row[i], widths[i]);
    }
    line.erase(line.find_last_not_of(' ') + 1);
    text += line + '\n';
  }
  return text;
}

std::string markdown(const std::vector<Cells>& rows) {
  std::string text;
  for (const Cells& row : rows) {
    text += fmt::format("| {} |\n", fmt::join(row, " | "));
    if (&row == &rows.front()) {
      text += "|---";
      for (std::size_t i = 1; i < row.size(); ++i) {
        text += "|--:";
      }
      text += "|\n";
    }
  }
  return text;
}

std::string csv(const std::vector<Cells>& rows) {
  const auto quoted = [](const std::string& cell) {
    if (cell == kNothing) {
      return std::string();
    }
    if (cell.find_first_of(",\"\n") == std::string::npos) {
      return cell;
    }
    std::string text = "\"";
    for (const char c : cell) {
      text += c == '"' ? "\"\"" : std::string(1, c);
    }
    return text + '"';
  };
  std::string text;
  for (Cells row : rows) {
    std::transform(row.begin(), row.end(), row.begin(), quoted);
    text += fmt::format("{}\n", fmt::join(row, ","));
  }
  return text;
}

}  // namespace misa::cli
