// SPDX-License-Identifier: Apache-2.0
// Block means of a pack's keys, as a caller that never has all keys in one place would give them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <iterator>
#include <vector>

#include "core/problem.hpp"
#include "misa/view.hpp"

namespace misa::test {

struct GivenMeans {
  std::int64_t dim = 0;
  std::vector<float> rows;
  std::vector<std::int32_t> starts;
  std::vector<std::int32_t> ends;
  std::vector<std::int32_t> partial;

  [[nodiscard]] std::int64_t count() const { return std::ssize(rows) / dim; }
  [[nodiscard]] RaggedMeans view() const {
    return {rows.data(), count(), dim, 0, starts, ends, partial};
  }

  // Means of blocks of `block` keys, computed in double. Per run of queries of one sequence: the
  // whole blocks, then the partial block of each query.
  static GivenMeans of(const Queries& q, const Weights& w, const RaggedKeys& k,
                       std::int64_t block) {
    const IndexerConfig config;
    const Problem problem{config, q, w, RaggedSource{k}, {}};
    GivenMeans means;
    means.dim = k.dim;
    const auto add_row = [&](std::int64_t t, std::int64_t first, std::int64_t last) {
      for (std::int64_t d = 0; d < k.dim; ++d) {
        double sum = 0;
        for (std::int64_t position = first; position < last; ++position) {
          const Key key = problem.key(t, position);
          sum += double{key.scale} * element(key.data, k.dtype, d);
        }
        means.rows.push_back(static_cast<float>(sum / static_cast<double>(last - first)));
      }
      return static_cast<std::int32_t>(means.count() - 1);
    };
    for (std::int64_t t = 0; t < q.tokens;) {
      const Sequence run = problem.sequence_at(t, q.tokens);
      const auto first = static_cast<std::int32_t>(means.count());
      std::int64_t longest = 0;
      for (std::int64_t i = 0; i < run.queries; ++i) {
        longest = std::max(longest, problem.visible(t + i));
      }
      for (std::int64_t b = 0; b < longest / block; ++b) {
        add_row(t, b * block, (b + 1) * block);
      }
      for (std::int64_t i = 0; i < run.queries; ++i) {
        const std::int64_t n = problem.visible(t + i);
        means.starts.push_back(first);
        means.ends.push_back(first + static_cast<std::int32_t>(n / block));
        means.partial.push_back(n % block == 0 ? -1 : add_row(t + i, n / block * block, n));
      }
      t += run.queries;
    }
    return means;
  }
};

}  // namespace misa::test
