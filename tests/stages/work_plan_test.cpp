// SPDX-License-Identifier: Apache-2.0
// How fused scoring cuts a slab: host code, judged without a device.
#include "fused/work_plan.hpp"
#include "score/sm90_fp8.hpp"

#include <gtest/gtest.h>

#include <algorithm>
#include <numeric>

#include "cuda/problem.hpp"

namespace misa::cuda::fused {
namespace {

constexpr int kProcessors = 132;  // of an H100 or H200

// Every shape that a few sizes of each kind make.
template <class Body>
void for_each_shape(const Body& body) {
  for (const std::int64_t tokens : {1, 63, 64, 65, 1000, 2048, 4096}) {
    for (const std::int64_t keys : {1, 64, 129, 2048, 2049, 8192, 65536, 131072, 300000, 1 << 20}) {
      for (const std::int64_t seen : {std::int64_t{1}, (keys + 2) / 3, keys}) {
        for (const int rows : {1, 4, 5, 8, 9, 32, 33, 64}) {
          for (const int top_k : {1, 512, 2048, 8192}) {
            const Shape shape{tokens, keys, seen, rows, top_k, kProcessors};
            SCOPED_TRACE(::testing::Message() << "T " << tokens << ", L " << keys << ", n " << seen
                                              << ", rows " << rows << ", k " << top_k);
            body(shape, plan_work(shape));
          }
        }
      }
    }
  }
}

TEST(FusedLayout, SamplesCoverTheKeys) {
  for_each_shape([](const Shape& shape, const WorkPlan& cut) {
    ASSERT_GE(cut.sample_stride, 1);
    ASSERT_EQ(cut.samples, (shape.total_keys + cut.sample_stride - 1) / cut.sample_stride);
    // 2048, or of long contexts about every 128th key, as far as the thresholds' kernel takes them
    // (src/select/fused.hpp).
    ASSERT_LE(cut.samples, std::clamp<std::int64_t>(shape.total_keys / 128, 2048, 4096));
    ASSERT_LE(cut.sample_stride, std::max<std::int64_t>(129, (shape.total_keys + 4095) / 4096));
  });
}

TEST(FusedLayout, ListsHoldTheTopKOrAllThatIsSeen) {
  for_each_shape([](const Shape& shape, const WorkPlan& cut) {
    ASSERT_GE(cut.lists, 1);
    ASSERT_LE(cut.lists, 32);  // the lanes that look after them (src/select/survivors.cu)
    const auto room = static_cast<std::int64_t>(cut.capacity) * cut.all.parts / cut.all.share;
    ASSERT_GE(room, std::min<std::int64_t>(shape.top_k, shape.max_keys));
    // Three tiles of nothing but good keys, or all tiles of the list.
    const std::int64_t tiles = (shape.max_keys + 255) / 256 + 1;
    const std::int64_t own = (tiles + cut.all.parts - 1) / cut.all.parts * cut.all.share * 256;
    ASSERT_GE(cut.capacity, std::min<std::int64_t>(own, 768));
    ASSERT_LE(cut.capacity, own);
  });
}

// Tile i goes to the part whose number times `step` is i modulo `parts`: to one, and a thread block
// that has consecutive ones goes round once at most.
void expect_all_dealt(const Deal& deal) {
  ASSERT_GE(deal.share, 1);
  ASSERT_GE(deal.parts, deal.share);
  ASSERT_EQ(std::gcd(deal.step, deal.parts), 1);
  ASSERT_GE(deal.step, 1);
  ASSERT_LE((deal.share - 1) * deal.step, deal.parts);
}

TEST(FusedLayout, TilesAreDealtOut) {
  for_each_shape([](const Shape&, const WorkPlan& cut) {
    expect_all_dealt(cut.sampled);
    ASSERT_EQ(cut.sampled.share, 1);
    expect_all_dealt(cut.all);
    // Thread block b has parts b share to (b + 1) share - 1 of all blocks of queries in a row.
    for (std::int64_t block = 0; block < 64; ++block) {
      const std::int64_t first = block * cut.all.parts / cut.all.share;
      const std::int64_t last = ((block + 1) * cut.all.parts - 1) / cut.all.share;
      ASSERT_LT(last - first, cut.lists);
    }
  });
}

// Parts exist to occupy num_sms: more than one only where blocks do not fill them evenly, and
// several a thread block only where that pays for beginning twice.
TEST(FusedLayout, PartsOccupyTheProcessors) {
  const WorkPlan one_query = plan_work({1, 65536, 65536, 8, 2048, kProcessors});
  EXPECT_GT(one_query.all.parts, 1);
  const WorkPlan many = plan_work({64 * kProcessors, 65536, 65536, 8, 2048, kProcessors});
  EXPECT_EQ(many.all.parts, 1);
  const WorkPlan slab = plan_work({2048, 131072, 131072, 8, 2048, kProcessors});
  EXPECT_EQ(slab.all.parts * 32, slab.all.share * kProcessors);
  const WorkPlan brief = plan_work({2048, 4096, 4096, 8, 2048, kProcessors});
  EXPECT_EQ(brief.all.share, 1);
}

// What a plan's default cap must hold: a slab of 2048 queries.
TEST(FusedLayout, ASlabOfTwoThousandQueriesIsSmall) {
  for (const std::int64_t keys : {65536, 131072}) {
    const WorkPlan cut = plan_work({2048, keys, keys, 8, 2048, kProcessors});
    const std::int64_t bytes =
        2048 * cut.lists * std::int64_t{cut.capacity} * std::int64_t{sizeof(Candidate)};
    EXPECT_LE(bytes, std::int64_t{192} << 20) << keys;
  }
}

TEST(FusedLayout, ScalesAreWholeTiles) {
  for (const std::int64_t keys : {0, 1, 255, 256, 257, 65536}) {
    EXPECT_GE(score::scale_count(keys), keys);
    EXPECT_LT(score::scale_count(keys), keys + 256);
    EXPECT_EQ(score::scale_count(keys) % 256, 0);
  }
}

}  // namespace
}  // namespace misa::cuda::fused
