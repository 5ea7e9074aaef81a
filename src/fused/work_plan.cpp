// SPDX-License-Identifier: Apache-2.0
#include "fused/work_plan.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <numeric>

#include "fused/sm90_fp8_config.cuh"
#include "select/fused.hpp"

namespace misa::cuda::fused {
namespace {

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// With 2048 samples of 64K keys and k = 2048 a query's top k holds 64 of them; the threshold, five
// standard deviations beyond (select/threshold.cu), then lets through 1.6 times k. Twice as many
// samples would let through 1.4 times k, which does not make up for scoring them. Of longer
// contexts about every 128th key is one, as far as the thresholds' kernel takes them: with 2048 of
// 1M the top k would hold 4, and 4.3 times k pass.
constexpr std::int64_t kSamples = 2048;
constexpr std::int64_t kMostStride = 128;

constexpr int kMaxLists = static_cast<int>(select::kMaxLists);

// Parts that a thread block takes at most.
constexpr int kMaxShare = 8;

// What it costs a thread block to begin with a block of queries, in keys that it scores meanwhile
// with up to 32 rows a query: 5 us (docs/kernels/fused.md).
constexpr double kBeginKeys = 384;

// What a deal has to be better than another one by, if it makes more lists.
constexpr double kWorthwhile = 0.995;

Deal deal(int parts, int share) {
  int step = parts / share;
  while (std::gcd(step, parts) != 1) {
    --step;
  }
  return {parts, share, step};
}

// Thread blocks that have parts of one block of queries, at the most.
int lists(int parts, int share) {
  int most = 1;
  for (int block = 0; block < share; ++block) {  // then it repeats
    const int first = block * parts;
    most = std::max(most, (first + parts - 1) / share - first / share + 1);
  }
  return most;
}

// The deal that is done first: in waves of thread blocks with a part each, or in one wave of those
// with up to max_share parts, of which two belong to every block of queries or more (or its one
// list more would be too many).
Deal fastest(std::int64_t blocks, std::int64_t keys, int tile_keys, int max_share, int num_sms) {
  const std::int64_t tiles = ceil_div(keys, tile_keys);
  Deal best{};
  double least = std::numeric_limits<double>::infinity();
  const auto consider = [&](int parts, int share) {
    const std::int64_t waves = ceil_div(ceil_div(blocks * parts, share), num_sms);
    const std::int64_t most = ceil_div(tiles * share, parts) * tile_keys;
    const double begins = share > 1 ? 2 : 1;
    const double time =
        static_cast<double>(waves) * (static_cast<double>(most) + begins * kBeginKeys);
    if (time < kWorthwhile * least && lists(parts, share) <= kMaxLists) {
      best = deal(parts, share);
      least = time;
    }
  };
  for (int parts = 1; parts <= kMaxLists; ++parts) {
    consider(parts, 1);
  }
  for (int share = 2; share <= max_share; ++share) {
    const auto parts = static_cast<int>(num_sms * std::int64_t{share} / blocks);
    if (parts >= 2 * share) {
      consider(parts, share);
    }
  }
  return best;
}

// Entries that a list of tiles with `share` of a query's keys must hold so that none is lost with a
// probability that matters: five standard deviations of the rank at which the threshold was taken,
// six of the list's share.
double room(const Shape& shape, std::int64_t samples, double share) {
  const auto keys = static_cast<double>(std::max<std::int64_t>(shape.max_keys, 1));
  const double seen = static_cast<double>(samples) * keys / static_cast<double>(shape.total_keys);
  const double rank = std::min(1.0, shape.top_k / keys) * seen;
  const double target = rank + 5 * std::sqrt(rank) + 1;
  const double most = (target + 5 * std::sqrt(target) + 1) / seen * keys * share;
  return most + 6 * std::sqrt(most);
}

// Tiles of which a list holds all keys: as many as may lie in a cluster of good keys, or in several
// that meet in one list.
constexpr std::int64_t kFullTiles = 3;

// Entries of a list.
std::int64_t capacity(const Shape& shape, const WorkPlan& layout, std::int64_t tiles) {
  // A round of tiles has one for each part; one round more where the ends are not whole ones.
  const std::int64_t own = ceil_div(tiles + 1, layout.all.parts) * layout.all.share;
  const double share = std::min(1.0, static_cast<double>(own) / static_cast<double>(tiles));
  const auto most = std::max(static_cast<std::int64_t>(room(shape, layout.samples, share)),
                             kFullTiles * kTileKeys);
  return std::min(own * kTileKeys, most);
}

}  // namespace

WorkPlan plan_work(const Shape& shape) {
  // As kernels are built for (for_rows).
  const auto rows =
      static_cast<int>(std::max(4U, std::bit_ceil(static_cast<unsigned>(shape.rows))));
  const std::int64_t queries = kGroups * group_columns(rows) / rows;
  WorkPlan layout{};
  const std::int64_t blocks = std::max<std::int64_t>(ceil_div(shape.tokens, queries), 1);
  const std::int64_t keys = std::max<std::int64_t>(shape.max_keys, 1);
  const std::int64_t samples =
      std::clamp(shape.total_keys / kMostStride, kSamples, select::kMaxSamples);
  layout.sample_stride = std::max<std::int64_t>(ceil_div(shape.total_keys, samples), 1);
  layout.samples = ceil_div(shape.total_keys, layout.sample_stride);
  layout.sampled = fastest(blocks, layout.samples, kSampleTileKeys, 1, shape.num_sms);
  layout.all = fastest(blocks, keys, kTileKeys, takes_pieces(rows) ? kMaxShare : 1, shape.num_sms);
  layout.lists = lists(layout.all.parts, layout.all.share);
  layout.capacity = static_cast<std::uint32_t>(capacity(shape, layout, ceil_div(keys, kTileKeys)));
  return layout;
}

}  // namespace misa::cuda::fused
