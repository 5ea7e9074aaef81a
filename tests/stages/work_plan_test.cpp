// SPDX-License-Identifier: Apache-2.0
// How fused scoring divides a chunk of queries: host code, tested without a device.
#include "fused/work_plan.hpp"
#include "score/sm90_fp8.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "cuda/problem.hpp"

namespace misa::cuda::fused {
namespace {

constexpr int kNumSms = 132;  // of an H100 or H200

// Every combination of a few sizes.
template <class Body>
void for_each_shape(const Body& body) {
  for (const std::int64_t tokens : {1, 63, 64, 65, 1000, 2048, 4096}) {
    for (const std::int64_t keys : {1, 64, 129, 2048, 2049, 8192, 65536, 131072, 300000, 1 << 20}) {
      for (const std::int64_t seen : {std::int64_t{1}, (keys + 2) / 3, keys}) {
        for (const int rows : {1, 4, 5, 8, 9, 32, 33, 64}) {
          for (const int top_k : {1, 512, 2048, 8192}) {
            const WorkShape shape{tokens, keys, seen, rows, top_k, kNumSms};
            SCOPED_TRACE(::testing::Message() << "T " << tokens << ", L " << keys << ", n " << seen
                                              << ", rows " << rows << ", k " << top_k);
            body(shape, plan_work(shape));
          }
        }
      }
    }
  }
}

TEST(FusedWorkPlan, SamplesCoverTheKeys) {
  for_each_shape([](const WorkShape& shape, const WorkPlan& plan) {
    ASSERT_GE(plan.sample_stride, 1);
    ASSERT_EQ(plan.samples, (shape.total_keys + plan.sample_stride - 1) / plan.sample_stride);
    // 2048, or of long contexts about every 128th key, up to the most that the threshold kernel
    // takes (src/select/gate.hpp).
    ASSERT_LE(plan.samples, std::clamp<std::int64_t>(shape.total_keys / 128, 2048, 4096));
    ASSERT_LE(plan.sample_stride, std::max<std::int64_t>(129, (shape.total_keys + 4095) / 4096));
  });
}

TEST(FusedWorkPlan, ListsHoldTheTopKOrAllThatIsSeen) {
  for_each_shape([](const WorkShape& shape, const WorkPlan& plan) {
    ASSERT_GE(plan.lists, 1);
    ASSERT_LE(plan.lists, 32);  // each lane of a warp reads one (src/select/survivors.cu)
    const auto entries = static_cast<std::int64_t>(plan.capacity) * plan.key_splits.splits /
                         plan.key_splits.per_block;
    ASSERT_GE(entries, std::min<std::int64_t>(shape.top_k, shape.max_keys));
    // Three tiles whose keys all pass, or all tiles of the list.
    const std::int64_t tiles = (shape.max_keys + 255) / 256 + 1;
    const std::int64_t list_keys = (tiles + plan.key_splits.splits - 1) / plan.key_splits.splits *
                                   plan.key_splits.per_block * 256;
    ASSERT_GE(plan.capacity, std::min<std::int64_t>(list_keys, 768));
    ASSERT_LE(plan.capacity, list_keys);
  });
}

// Tile i belongs to the split s with s * stride = i modulo `splits`, so to one. The tiles of a
// thread block's consecutive splits wrap around at most once.
void expect_every_tile_in_one_split(const KeySplits& splits) {
  ASSERT_GE(splits.per_block, 1);
  ASSERT_GE(splits.splits, splits.per_block);
  ASSERT_EQ(std::gcd(splits.stride, splits.splits), 1);
  ASSERT_GE(splits.stride, 1);
  ASSERT_LE((splits.per_block - 1) * splits.stride, splits.splits);
}

TEST(FusedWorkPlan, EveryTileIsInOneSplit) {
  for_each_shape([](const WorkShape&, const WorkPlan& plan) {
    expect_every_tile_in_one_split(plan.sample_splits);
    ASSERT_EQ(plan.sample_splits.per_block, 1);
    expect_every_tile_in_one_split(plan.key_splits);
    // Thread block b has splits b * per_block … (b + 1) * per_block - 1 of the sequence that the
    // query blocks' splits form.
    for (std::int64_t query_block = 0; query_block < 64; ++query_block) {
      const std::int64_t first = query_block * plan.key_splits.splits / plan.key_splits.per_block;
      const std::int64_t last =
          ((query_block + 1) * plan.key_splits.splits - 1) / plan.key_splits.per_block;
      ASSERT_LT(last - first, plan.lists);
    }
  });
}

// Splits exist to occupy the SMs: there are several only where query blocks do not fill the SMs
// evenly, and several per thread block only where that makes up for starting twice.
TEST(FusedWorkPlan, SplitsOccupyTheSms) {
  const WorkPlan one_query = plan_work({1, 65536, 65536, 8, 2048, kNumSms});
  EXPECT_GT(one_query.key_splits.splits, 1);
  const WorkPlan many_queries = plan_work({64 * kNumSms, 65536, 65536, 8, 2048, kNumSms});
  EXPECT_EQ(many_queries.key_splits.splits, 1);
  const WorkPlan chunk = plan_work({2048, 131072, 131072, 8, 2048, kNumSms});
  EXPECT_EQ(chunk.key_splits.splits * 32, chunk.key_splits.per_block * kNumSms);
  const WorkPlan few_keys = plan_work({2048, 4096, 4096, 8, 2048, kNumSms});
  EXPECT_EQ(few_keys.key_splits.per_block, 1);
}

// The default workspace cap of a plan must hold a chunk of 2048 queries.
TEST(FusedWorkPlan, AChunkOfTwoThousandQueriesIsSmall) {
  for (const std::int64_t keys : {65536, 131072}) {
    const WorkPlan plan = plan_work({2048, keys, keys, 8, 2048, kNumSms});
    const std::int64_t bytes =
        2048 * plan.lists * std::int64_t{plan.capacity} * std::int64_t{sizeof(Candidate)};
    EXPECT_LE(bytes, std::int64_t{192} << 20) << keys;
  }
}

TEST(FusedWorkPlan, ScalesAreWholeTiles) {
  for (const std::int64_t keys : {0, 1, 255, 256, 257, 65536}) {
    EXPECT_GE(score::scale_count(keys), keys);
    EXPECT_LT(score::scale_count(keys), keys + 256);
    EXPECT_EQ(score::scale_count(keys) % 256, 0);
  }
}

}  // namespace
}  // namespace misa::cuda::fused
