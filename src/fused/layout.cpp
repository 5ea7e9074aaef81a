#include "fused/layout.hpp"

#include <algorithm>
#include <bit>
#include <cmath>

#include "fused/sm90_config.cuh"

namespace misa::cuda::fused {
namespace {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// With 2048 samples of 64K keys and k = 2048 a query's top k holds 64 of them; the bound, five
// standard deviations beyond (select/threshold.cu), then lets through 1.6 times k. Twice as many
// samples would let through 1.4 times k, which does not make up for scoring them.
constexpr std::int64_t kSamples = 2048;

// Splits beyond these only shorten the lists.
constexpr int kMaxSplits = 16;

// The smallest number of splits that keeps the processors about as busy as any: blocks take equally
// long, so what counts is how full the last wave is.
int splits(std::int64_t blocks, int processors) {
  int best = 1;
  double best_use = 0;
  for (int count = 1; count <= kMaxSplits; ++count) {
    const double waves = static_cast<double>(blocks * count) / processors;
    const double use = waves / std::ceil(waves);
    if (use > best_use + 0.01) {
      best = count;
      best_use = use;
    }
  }
  return best;
}

// Entries that a list must hold so that none is lost with a probability that matters: five standard
// deviations of the rank at which the bound was taken, six of a list's share.
double room(const Shape& shape, std::int64_t samples, int splits) {
  const auto keys = static_cast<double>(std::max<std::int64_t>(shape.max_keys, 1));
  const double share = static_cast<double>(samples) * keys / static_cast<double>(shape.total_keys);
  const double rank = std::min(1.0, shape.top_k / keys) * share;
  const double target = rank + 5 * std::sqrt(rank) + 1;
  const double most = (target + 5 * std::sqrt(target) + 1) / share * keys / splits;
  return most + 6 * std::sqrt(most);
}

}  // namespace

std::int64_t scales(std::int64_t keys) { return ceil_div(keys, kTileKeys) * kTileKeys; }

Layout layout(const Shape& shape) {
  // As kernels are built for (for_rows).
  const auto rows =
      static_cast<int>(std::max(4U, std::bit_ceil(static_cast<unsigned>(shape.rows))));
  const std::int64_t queries = kGroups * group_columns(rows) / rows;
  Layout layout{};
  layout.splits =
      splits(std::max<std::int64_t>(ceil_div(shape.tokens, queries), 1), shape.processors);
  layout.sample_stride = std::max<std::int64_t>(ceil_div(shape.total_keys, kSamples), 1);
  layout.samples = ceil_div(shape.total_keys, layout.sample_stride);
  // A split sees every splits-th tile; one more than its share where the ends are not its own.
  const std::int64_t all =
      (ceil_div(ceil_div(shape.max_keys, kTileKeys) + 1, layout.splits)) * kTileKeys;
  const auto most = static_cast<std::int64_t>(
      std::min(static_cast<double>(all), room(shape, layout.samples, layout.splits)));
  // Even, so that entries are read in pairs.
  layout.capacity = static_cast<std::uint32_t>(ceil_div(std::max<std::int64_t>(most, 2), 2) * 2);
  return layout;
}

}  // namespace misa::cuda::fused
