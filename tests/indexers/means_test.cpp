// SPDX-License-Identifier: Apache-2.0
// Routing and the block filter from given block means, on every backend: equal to `select` on the
// keys that have these means, and to the reference for means without keys.
#include "support/means.hpp"

#include <cmath>
#include <limits>
#include <random>
#include <set>

#include "common.hpp"

namespace misa::test {
namespace {

class Means : public EachBackend {
 protected:
  [[nodiscard]] static std::vector<std::int32_t> route(const Context& on, const Queries& q,
                                                       const Weights& w, const RaggedMeans& means,
                                                       int heads) {
    std::vector<std::int32_t> out(static_cast<std::size_t>(q.tokens * heads), -77);
    route_from_means(on, q, w, means, heads, out);
    return out;
  }

  [[nodiscard]] static std::vector<std::int32_t> keep(const Context& on, const Queries& q,
                                                      const Weights& w, const RaggedMeans& means,
                                                      int blocks) {
    std::vector<std::int32_t> out(static_cast<std::size_t>(q.tokens * blocks), -77);
    keep_blocks_from_means(on, q, w, means, blocks, out);
    return out;
  }
};

// Small integers whose block means are exact: whole blocks have 64 keys, the number of keys in a
// partial block is a power of two. So fp32 is exact, and ties are common.
std::vector<RaggedInputs> exact_packs() {
  std::vector<RaggedInputs> packs;
  for (const DType q_dtype : {DType::f32, DType::bf16, DType::e4m3}) {
    for (const std::int64_t dim : {64, 128}) {
      PackSpec spec;
      spec.sequences = {{0, 1},   {1, 1},   {64, 1},   {640, 1},  {641, 2},
                        {642, 1}, {704, 1}, {1000, 1}, {1088, 2}, {5120, 3}};
      spec.values = Values::integers;
      spec.dim = dim;
      spec.q_dtype = q_dtype;
      spec.k_dtype = q_dtype;
      packs.emplace_back(make_pack(spec));
    }
  }
  return packs;
}

TEST_P(Means, SmokeRouteAsSelectDoes) {
  for (const RaggedInputs& inputs : exact_packs()) {
    const Queries q = inputs.q(inputs.all());
    const Weights w = inputs.w(inputs.all());
    const RaggedKeys k = inputs.k(inputs.all());
    for (const int heads : {1, 3}) {
      IndexerConfig config = IndexerConfig::misa(1, heads);
      config.block = 64;
      const Selected wanted = select(context(), config, q, w, k, {.heads = true});
      const GivenMeans means = GivenMeans::of(q, w, k, config.block);
      EXPECT_EQ(route(context(), q, w, means.view(), heads), wanted.heads)
          << name_of(q.dtype) << ", D = " << q.dim;
    }
  }
}

// top_k exceeds the positions of all kept blocks but one, so every kept block has a selected one.
TEST_P(Means, SmokeKeepBlocksAsSelectDoes) {
  constexpr int kKept = 4;
  constexpr int kBlock = 64;
  constexpr int kTopK = (kKept - 1) * kBlock + 1;
  for (const RaggedInputs& inputs : exact_packs()) {
    const Queries q = inputs.q(inputs.all());
    const Weights w = inputs.w(inputs.all());
    const RaggedKeys k = inputs.k(inputs.all());
    const IndexerConfig config = IndexerConfig::hisa(kTopK, kBlock, kKept);
    const Selected selected = select(context(), config, q, w, k);
    std::vector<std::int32_t> wanted;
    for (std::int64_t t = 0; t < q.tokens; ++t) {
      std::set<std::int32_t> blocks;
      for (int i = 0; i < kTopK; ++i) {
        if (const std::int32_t position = selected.indices[t * kTopK + i]; position >= 0) {
          blocks.insert(position / kBlock);
        }
      }
      wanted.insert(wanted.end(), blocks.begin(), blocks.end());
      wanted.insert(wanted.end(), kKept - blocks.size(), -1);
    }
    const GivenMeans means = GivenMeans::of(q, w, k, kBlock);
    EXPECT_EQ(keep(context(), q, w, means.view(), kKept), wanted)
        << name_of(q.dtype) << ", D = " << q.dim;
  }
}

// Means of small integers in rows that several queries share, in any order, with more blocks than a
// warp holds scores of; and the queries of a pack.
struct SharedRows {
  RaggedInputs inputs;
  GivenMeans means;

  explicit SharedRows(DType q_dtype, std::int64_t heads = 8)
      : inputs(make_pack({.sequences = {{12, 12}},
                          .heads = heads,
                          .q_dtype = q_dtype,
                          .values = Values::integers})) {
    constexpr std::int32_t kRows = 1200;
    std::mt19937 engine(7);
    const auto random = [&](std::int32_t below) {
      return static_cast<std::int32_t>(engine() % static_cast<std::uint32_t>(below));
    };
    means.dim = 64;
    for (std::int64_t i = 0; i < kRows * means.dim; ++i) {
      means.rows.push_back(static_cast<float>(random(9) - 4));
    }
    for (std::int64_t t = 0; t < inputs.tokens(); ++t) {
      const std::int32_t start = random(kRows);
      means.starts.push_back(start);
      means.ends.push_back(t % 5 == 0 ? start - start % 7 : start + random(kRows - start));
      means.partial.push_back(t % 3 == 0 ? -1 : random(kRows));
    }
    means.ends[1] = kRows;
    means.starts[1] = 0;
  }

  [[nodiscard]] Queries q() const { return inputs.q(inputs.all()); }
  [[nodiscard]] Weights w() const { return inputs.w(inputs.all()); }
};

TEST_P(Means, SmokeRowsMayBeShared) {
  for (const DType q_dtype : {DType::f32, DType::bf16, DType::e4m3}) {
    for (const std::int64_t heads : {1, 8, 200}) {
      const SharedRows in(q_dtype, heads);
      const RaggedMeans means = in.means.view();
      for (const int count : {0, 1, static_cast<int>(heads)}) {
        EXPECT_EQ(route(context(2), in.q(), in.w(), means, count),
                  route(context_for("reference"), in.q(), in.w(), means, count))
            << count << " of " << heads << " heads, " << name_of(q_dtype);
      }
      for (const int count : {2, 3, 64, 4000}) {
        EXPECT_EQ(keep(context(2), in.q(), in.w(), means, count),
                  keep(context_for("reference"), in.q(), in.w(), means, count))
            << count << " blocks, " << heads << " heads, " << name_of(q_dtype);
      }
    }
  }
}

// Non-finite means of a query's blocks do not change its neighbours.
TEST_P(Means, NotFinite) {
  constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
  constexpr float kInf = std::numeric_limits<float>::infinity();
  for (const float value : {kNan, kInf, -kInf}) {
    SharedRows in(DType::f32);
    const std::vector<std::int32_t> heads = route(context(), in.q(), in.w(), in.means.view(), 3);
    const std::vector<std::int32_t> kept = keep(context(), in.q(), in.w(), in.means.view(), 5);
    const std::int32_t row = in.means.starts[2];
    in.means.rows[row * in.means.dim + 5] = value;
    const std::vector<std::int32_t> then = route(context(), in.q(), in.w(), in.means.view(), 3);
    const std::vector<std::int32_t> kept_then = keep(context(), in.q(), in.w(), in.means.view(), 5);
    // What an infinity makes of a product in parts depends on the backend (docs/numerics.md).
    if (std::isnan(value)) {
      EXPECT_EQ(then, route(context_for("reference"), in.q(), in.w(), in.means.view(), 3));
      EXPECT_EQ(kept_then, keep(context_for("reference"), in.q(), in.w(), in.means.view(), 5));
    }
    for (std::size_t t = 0; t < in.means.starts.size(); ++t) {
      if ((in.means.starts[t] > row || in.means.ends[t] <= row) && in.means.partial[t] != row) {
        EXPECT_TRUE(std::equal(&then[3 * t], &then[3 * t + 3], &heads[3 * t])) << t;
        EXPECT_TRUE(std::equal(&kept_then[5 * t], &kept_then[5 * t + 5], &kept[5 * t])) << t;
      }
    }
  }
}

TEST_P(Means, SmokeNothingToSee) {
  SharedRows in(DType::bf16);
  in.means.ends = in.means.starts;
  in.means.partial.clear();
  const auto all_none = [](const std::vector<std::int32_t>& rows) {
    return std::all_of(rows.begin(), rows.end(), [](std::int32_t each) { return each == -1; });
  };
  EXPECT_TRUE(all_none(route(context(), in.q(), in.w(), in.means.view(), 3)));
  EXPECT_TRUE(all_none(keep(context(), in.q(), in.w(), in.means.view(), 3)));
  const std::vector<std::int32_t> zeros(in.means.starts.size());
  const RaggedMeans none{nullptr, 0, 64, 0, zeros, zeros, {}};
  EXPECT_TRUE(all_none(route(context(), in.q(), in.w(), none, 3)));
  EXPECT_TRUE(all_none(keep(context(), in.q(), in.w(), none, 3)));
  Queries q = in.q();
  Weights w = in.w();
  q.tokens = w.tokens = 0;
  EXPECT_TRUE(route(context(), q, w, {in.means.rows.data(), 1, 64, 0, {}, {}, {}}, 3).empty());
  EXPECT_TRUE(keep(context(), q, w, {in.means.rows.data(), 1, 64, 0, {}, {}, {}}, 3).empty());
}

TEST_P(Means, StridesAreHonoured) {
  SharedRows in(DType::f32);
  std::vector<float> padded(in.means.count() * 70, std::numeric_limits<float>::quiet_NaN());
  for (std::int64_t row = 0; row < in.means.count(); ++row) {
    std::copy_n(&in.means.rows[row * 64], 64, &padded[row * 70]);
  }
  RaggedMeans means = in.means.view();
  means.data = padded.data();
  means.row_stride = 70;
  EXPECT_EQ(route(context(), in.q(), in.w(), means, 3),
            route(context(), in.q(), in.w(), in.means.view(), 3));
  EXPECT_EQ(keep(context(), in.q(), in.w(), means, 6),
            keep(context(), in.q(), in.w(), in.means.view(), 6));
}

INSTANTIATE_TEST_SUITE_P(Each, Means, ::testing::ValuesIn(available_backends()), backend_name);

}  // namespace
}  // namespace misa::test
