// SPDX-License-Identifier: Apache-2.0
#include "metrics.hpp"

#include <algorithm>
#include <cmath>
#include <functional>
#include <iterator>
#include <numeric>

namespace misa::cli {
namespace {

std::vector<std::int32_t> sorted_positions(std::span<const std::int32_t> row) {
  std::vector<std::int32_t> positions;
  std::copy_if(row.begin(), row.end(), std::back_inserter(positions),
               [](std::int32_t position) { return position >= 0; });
  std::sort(positions.begin(), positions.end());
  return positions;
}

}  // namespace

double recall(std::span<const std::int32_t> selected, std::span<const std::int32_t> wanted) {
  const auto have = sorted_positions(selected);
  const auto want = sorted_positions(wanted);
  std::vector<std::int32_t> common;
  std::set_intersection(have.begin(), have.end(), want.begin(), want.end(),
                        std::back_inserter(common));
  return want.empty() ? 1.0 : static_cast<double>(common.size()) / static_cast<double>(want.size());
}

double attention_mass(std::span<const std::int32_t> selected, std::span<const float> attention) {
  const double total = std::accumulate(attention.begin(), attention.end(), 0.0);
  double kept = 0;
  for (const std::int32_t position : selected) {
    if (position >= 0) {
      kept += attention[static_cast<std::size_t>(position)];
    }
  }
  return total > 0 ? kept / total : 0;
}

double best_attention_mass(std::span<const float> attention, std::int64_t top_k) {
  std::vector<float> sorted(attention.begin(), attention.end());
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const auto kept = std::min<std::ptrdiff_t>(top_k, std::ssize(sorted));
  const double total = std::accumulate(sorted.begin(), sorted.end(), 0.0);
  return total > 0 ? std::accumulate(sorted.begin(), sorted.begin() + kept, 0.0) / total : 0;
}

double quantile(std::vector<double> values, double p) {
  std::sort(values.begin(), values.end());
  const double at = p * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::size_t>(at);
  const std::size_t above = std::min(below + 1, values.size() - 1);
  return std::lerp(values[below], values[above], at - static_cast<double>(below));
}

double mean(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

Summary summarize(const std::vector<double>& values) {
  return {mean(values), quantile(values, 0.05), quantile(values, 0)};
}

}  // namespace misa::cli
