// SPDX-License-Identifier: Apache-2.0
#include "score/reference.hpp"

namespace misa::reference {

double score(const Row& row, std::span<const double> key, std::span<const std::int32_t> heads,
             std::span<const double> residual) {
  double sum = 0;
  for (const std::int32_t j : heads) {
    sum += row.w[j] * relu(dot(row.query(j), key));
  }
  return residual.empty() ? sum : sum + dot(residual, key);
}

}  // namespace misa::reference
