// SPDX-License-Identifier: Apache-2.0
// The rank of the gate threshold against simulated rows: as many scores as wanted pass, and no list
// of candidates overflows.
#include "select/gate_rank.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <cstdint>
#include <random>

#include "fused/sm90_fp8_config.cuh"
#include "fused/work_plan.hpp"

namespace misa::cuda::fused {
namespace {

constexpr int kRows = 300;

// The share of a row's scores that exceed the score of rank `rank` of `sampled` random ones.
double share_above(std::uint32_t rank, std::uint32_t sampled, std::mt19937_64& random) {
  std::gamma_distribution<double> above(rank);
  std::gamma_distribution<double> below(sampled + 1 - rank);
  const double a = above(random);
  return a / (a + below(random));
}

std::int64_t count_above(std::int64_t keys, double share, std::mt19937_64& random) {
  return share < 1 ? std::binomial_distribution<std::int64_t>(keys, share)(random) : keys;
}

// The most keys of one list of a query that sees `keys` keys: the tiles of per_block consecutive
// splits (KeySplits).
std::int64_t longest_list(const KeySplits& splits, std::int64_t keys) {
  std::int64_t longest = 0;
  for (int first = 0; first + splits.per_block <= splits.splits; ++first) {
    std::int64_t list = 0;
    for (int split = first; split < first + splits.per_block; ++split) {
      const std::int64_t stride = std::int64_t{splits.splits} * kTileKeys;
      for (std::int64_t key = std::int64_t{split} * splits.stride % splits.splits * kTileKeys;
           key < keys; key += stride) {
        list += std::min<std::int64_t>(kTileKeys, keys - key);
      }
    }
    longest = std::max(longest, list);
  }
  return longest;
}

TEST(GateRank, AsManyScoresPassAsAreWanted) {
  std::mt19937_64 random(1);
  for (const std::uint32_t keys : {4096U, 16384U, 65536U, 262144U, 1U << 20}) {
    for (const std::uint32_t top_k : {512U, 2048U, 8192U}) {
      const std::uint32_t sampled = std::clamp(keys / 128, 2048U, 4096U);
      if (top_k >= keys) {
        continue;
      }
      const auto rank = select::threshold_rank<float>(sampled, keys, top_k);
      EXPECT_EQ(rank, select::threshold_rank<double>(sampled, keys, top_k));
      for (int row = 0; row < kRows && rank <= sampled; ++row) {
        // Of the samples rank - 1 exceed the one at the threshold.
        const double share = share_above(rank, sampled, random);
        ASSERT_GE(rank - 1 + count_above(keys - sampled, share, random), top_k)
            << keys << " keys, k " << top_k;
      }
    }
  }
}

TEST(GateRank, ListsHoldWhatPasses) {
  std::mt19937_64 random(2);
  for (const std::int64_t tokens : {1, 500, 2048}) {
    for (const std::int64_t max_keys : {16384, 65536, 131072, 262144}) {
      for (const int top_k : {512, 2048, 8192}) {
        const WorkPlan plan = plan_work({tokens, max_keys, max_keys, 8, top_k, 132});
        for (const std::int64_t keys : {max_keys, max_keys / 2, max_keys / 5, max_keys / 16}) {
          const std::int64_t list = longest_list(plan.key_splits, keys);
          const auto sampled = static_cast<std::uint32_t>(keys / plan.sample_stride);
          std::uint32_t rank = keys > top_k ? select::threshold_rank<double>(
                                                  sampled, static_cast<std::uint32_t>(keys), top_k)
                                            : sampled + 1;
          rank += rank / 16;  // as the threshold may let a sixteenth more samples pass
          for (int row = 0; row < kRows; ++row) {
            const double share = rank <= sampled ? share_above(rank, sampled, random) : 1;
            ASSERT_LE(count_above(list, share, random), plan.capacity)
                << tokens << " queries of up to " << max_keys << " keys, this one of " << keys
                << ", k " << top_k << ", " << plan.key_splits.per_block << " of "
                << plan.key_splits.splits << " splits";
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace misa::cuda::fused
