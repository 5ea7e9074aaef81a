// SPDX-License-Identifier: Apache-2.0
#include "fused/work_plan.hpp"

#include <algorithm>
#include <bit>
#include <limits>
#include <numeric>

#include "core/ceil_div.hpp"
#include "fused/sm90_fp8_config.cuh"
#include "select/gate.hpp"
#include "select/gate_rank.hpp"

namespace misa::cuda::fused {
namespace {

// With 2048 samples of 64K keys and k = 2048, a query's top k holds 64 samples on average, and the
// gate threshold, which leaves a margin (select/gate_rank.hpp), lets through 1.6 times k. Twice as
// many samples would let through 1.4 times k, which saves less than scoring them costs. In longer
// contexts about every 128th key is a sample, up to the most that the threshold kernel takes: with
// 2048 samples of 1M keys, the top k would hold 4, and 4.3 times k would pass.
constexpr std::int64_t kSamples = 2048;
constexpr std::int64_t kMaxSampleStride = 128;

constexpr int kMaxLists = static_cast<int>(select::kMaxLists);

constexpr int kMaxSplitsPerBlock = 8;

// The cost of starting a query block, 5 us (docs/kernels/fused.md), as the number of keys that a
// thread block could score in that time with up to 32 rows per query.
constexpr double kStartupKeys = 384;

// A division into more lists is chosen only if its time is less than this fraction of the best one
// so far.
constexpr double kWorthwhile = 0.995;

KeySplits make_splits(int splits, int per_block) {
  int stride = splits / per_block;
  while (std::gcd(stride, splits) != 1) {
    --stride;
  }
  return {splits, per_block, stride};
}

// The most thread blocks that score splits of one query block.
int max_lists(int splits, int per_block) {
  int most = 1;
  for (int query_block = 0; query_block < per_block; ++query_block) {  // then the pattern repeats
    const int first = query_block * splits;
    most = std::max(most, (first + splits - 1) / per_block - first / per_block + 1);
  }
  return most;
}

// The splits that take the least time. Either thread blocks score one split each, in as many waves
// as that takes; or they score up to max_per_block splits each, in a single wave. In the second
// case a query block must have splits for at least two thread blocks: with fewer, the time saved
// would not outweigh the additional list.
KeySplits fastest_splits(std::int64_t query_blocks, std::int64_t keys, int tile_keys,
                         int max_per_block, int num_sms) {
  const std::int64_t tiles = ceil_div(keys, tile_keys);
  KeySplits fastest{};
  double least_time = std::numeric_limits<double>::infinity();
  const auto consider = [&](int splits, int per_block) {
    const std::int64_t waves = ceil_div(ceil_div(query_blocks * splits, per_block), num_sms);
    const std::int64_t block_keys = ceil_div(tiles * per_block, splits) * tile_keys;
    const double starts = per_block > 1 ? 2 : 1;
    const double time =
        static_cast<double>(waves) * (static_cast<double>(block_keys) + starts * kStartupKeys);
    if (time < kWorthwhile * least_time && max_lists(splits, per_block) <= kMaxLists) {
      fastest = make_splits(splits, per_block);
      least_time = time;
    }
  };
  for (int splits = 1; splits <= kMaxLists; ++splits) {
    consider(splits, 1);
  }
  for (int per_block = 2; per_block <= max_per_block; ++per_block) {
    const auto splits = static_cast<int>(num_sms * std::int64_t{per_block} / query_blocks);
    if (splits >= 2 * per_block) {
      consider(splits, per_block);
    }
  }
  return fastest;
}

// How many entries a list for the fraction `share` of a query's keys must hold so that it overflows
// as rarely as gate_rank.hpp says. The samples down to the threshold's rank pass the gate, and
// about the same fraction of all keys passes with them.
double passing_entries(const WorkShape& shape, std::int64_t samples, double share) {
  const std::int64_t keys = std::max<std::int64_t>(shape.max_keys, 1);
  const double sampled_share = static_cast<double>(samples) / static_cast<double>(shape.total_keys);
  const double rank = select::threshold_rank<double>(
      static_cast<std::uint32_t>(sampled_share * static_cast<double>(keys)),
      static_cast<std::uint32_t>(keys),
      static_cast<std::uint32_t>(std::min<std::int64_t>(shape.top_k, keys)));
  const double passing = select::upper_count(rank, rank) / sampled_share;
  return select::upper_count(passing * share, passing * share);
}

// A list has room for all keys of at least this many tiles, because a cluster of keys that pass may
// fill several tiles of one list.
constexpr std::int64_t kFullTiles = 3;

// Entries of a list, where a query sees `tiles` tiles.
std::int64_t list_capacity(const WorkShape& shape, const WorkPlan& plan, std::int64_t tiles) {
  // Of any key_splits.splits consecutive tiles, each split has one. The visible keys may start
  // inside a tile and then touch one tile more.
  const std::int64_t list_tiles =
      ceil_div(tiles + 1, plan.key_splits.splits) * plan.key_splits.per_block;
  const double share = std::min(1.0, static_cast<double>(list_tiles) / static_cast<double>(tiles));
  const auto entries =
      std::max(static_cast<std::int64_t>(passing_entries(shape, plan.samples, share)),
               kFullTiles * kTileKeys);
  return std::min(list_tiles * kTileKeys, entries);
}

}  // namespace

WorkPlan plan_work(const WorkShape& shape) {
  // The rows that kernels are built for (for_rows).
  const auto rows =
      static_cast<int>(std::max(4U, std::bit_ceil(static_cast<unsigned>(shape.rows))));
  const std::int64_t queries = kWarpgroups * warpgroup_columns(rows) / rows;
  WorkPlan plan{};
  const std::int64_t query_blocks = std::max<std::int64_t>(ceil_div(shape.tokens, queries), 1);
  const std::int64_t keys = std::max<std::int64_t>(shape.max_keys, 1);
  const std::int64_t samples =
      std::clamp(shape.total_keys / kMaxSampleStride, kSamples, select::kMaxGateSamples);
  plan.sample_stride = std::max<std::int64_t>(ceil_div(shape.total_keys, samples), 1);
  plan.samples = ceil_div(shape.total_keys, plan.sample_stride);
  plan.sample_splits =
      fastest_splits(query_blocks, plan.samples, kSampleTileKeys, 1, shape.num_sms);
  plan.key_splits =
      fastest_splits(query_blocks, keys, kTileKeys,
                     may_span_query_blocks(rows) ? kMaxSplitsPerBlock : 1, shape.num_sms);
  plan.lists = max_lists(plan.key_splits.splits, plan.key_splits.per_block);
  plan.capacity = static_cast<std::uint32_t>(list_capacity(shape, plan, ceil_div(keys, kTileKeys)));
  return plan;
}

}  // namespace misa::cuda::fused
