// SPDX-License-Identifier: Apache-2.0
#include "select/reference.hpp"

#include <algorithm>
#include <cmath>
#include <numeric>

namespace misa::reference {

std::vector<std::int64_t> top_k(std::span<const double> values, std::int64_t k) {
  std::vector<std::int64_t> order(values.size());
  std::iota(order.begin(), order.end(), 0);
  std::stable_sort(order.begin(), order.end(), [&](std::int64_t a, std::int64_t b) {
    return std::isnan(values[b]) ? !std::isnan(values[a]) : values[a] > values[b];
  });
  order.resize(std::min(order.size(), static_cast<std::size_t>(k)));
  std::sort(order.begin(), order.end());
  return order;
}

}  // namespace misa::reference
