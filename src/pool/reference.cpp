// SPDX-License-Identifier: Apache-2.0
#include "pool/reference.hpp"

namespace misa::reference {

std::vector<std::vector<double>> block_means(const Row& row, std::int64_t block) {
  std::vector<std::vector<double>> means;
  for (std::int64_t first = 0; first < row.length; first += block) {
    const std::int64_t last = std::min(first + block, row.length);
    std::vector<double> mean(static_cast<std::size_t>(row.dim));
    for (std::size_t d = 0; d < mean.size(); ++d) {
      // Keys of a page in order, then pages in order.
      for (std::int64_t page = first; page < last; page += kPageSize) {
        double page_sum = 0;
        for (std::int64_t s = page; s < std::min(page + kPageSize, last); ++s) {
          page_sum += row.key(s)[d];
        }
        mean[d] += page_sum;
      }
      mean[d] /= static_cast<double>(last - first);
    }
    means.push_back(std::move(mean));
  }
  return means;
}

}  // namespace misa::reference
