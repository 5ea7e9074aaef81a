// SPDX-License-Identifier: Apache-2.0
#include "fused/cpu.hpp"

#include <algorithm>
#include <numeric>

#include "cpu/load.hpp"

namespace misa::cpu {
namespace {

// The order in which pages are scored: in golden-ratio steps. The pages scored so far are then a
// fair sample of the context, even if scores have a trend along it, so the selectors' thresholds
// rise early.
class PageOrder {
 public:
  explicit PageOrder(std::int64_t pages)
      : pages_(pages), stride_(std::max<std::int64_t>(1, pages * 618 / 1000)) {
    while (std::gcd(stride_, pages) > 1) {
      ++stride_;
    }
  }

  // The first position of the i-th page of the order.
  [[nodiscard]] std::int64_t position(std::int64_t i) const {
    return i * stride_ % pages_ * kPageSize;
  }

 private:
  std::int64_t pages_;
  std::int64_t stride_;
};

// Whether a query scores the page that starts at a position.
bool scores_page(const Query& query, std::int64_t filter_block, std::int64_t first) {
  if (!query.scored || query.n <= first) {
    return false;
  }
  if (!query.recipe.filtered) {
    return true;
  }
  const std::int64_t block = first / filter_block;
  return (query.kept_blocks[block / 64] >> (block % 64) & 1) != 0;
}

int keys_in_page(std::int64_t n, std::int64_t first) {
  return static_cast<int>(std::min<std::int64_t>(kPageSize, n - first));
}

}  // namespace

void score_pages(const Kernels& kernels, const Problem& problem, std::span<const Query> queries,
                 KeySplit split, Operand operand, ScoreScratch& scratch) {
  std::int64_t longest = 0;
  for (const Query& query : queries) {
    longest = std::max(longest, query.scored ? query.n : 0);
  }
  const std::int64_t pages = (longest + kPageSize - 1) / kPageSize;
  const PageOrder order(pages);
  const std::int64_t t = queries.front().t;
  alignas(64) float scores[kPageSize];
  const std::int64_t end = pages * (split.index + 1) / split.count;
  // Scores the i-th page by the queries that take its keys, or their sketches.
  const auto score_page = [&](std::int64_t i, bool sketched) {
    const std::int64_t first = order.position(i);
    bool loaded = false;
    for (const Query& query : queries) {
      if (query.recipe.sketched != sketched ||
          !scores_page(query, problem.config.filter_block, first)) {
        continue;
      }
      if (!loaded) {
        const int count = keys_in_page(longest, first);
        if (sketched) {
          load_sketched_page(kernels, problem, t, first, count, operand, scratch.sketch,
                             scratch.pack, scratch.tile);
        } else {
          load_page(kernels, problem, t, first, count, operand, scratch.pack, scratch.tile);
        }
        loaded = true;
        if (i + 1 < end) {
          const std::int64_t next = order.position(i + 1);
          prefetch_page(problem, t, next, keys_in_page(longest, next));
        }
      }
      const int valid = keys_in_page(query.n, first);
      kernels.score(operand, query.rows, scratch.tile, valid, scores);
      kernels.offer(scores, scratch.tile.position, valid, query.selectors[split.index],
                    scratch.entries);
    }
  };
  for (std::int64_t i = pages * split.index / split.count; i < end; ++i) {
    score_page(i, false);
    if (problem.config.sketch != 0) {
      score_page(i, true);
    }
  }
}

}  // namespace misa::cpu
