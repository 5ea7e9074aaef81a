// SPDX-License-Identifier: Apache-2.0
// The checker itself: it must reject what a defective backend would return.
#include "support/check.hpp"

#include <algorithm>
#include <functional>

#include "support/tolerance.hpp"

namespace misa::test {
namespace {

constexpr int kTopK = 32;

struct Defect {
  std::string name;
  std::function<void(Selected&)> apply;
};

class SmokeChecker : public ::testing::Test {
 protected:
  SmokeChecker() : inputs_(make_pack(spec())) {}

  static PackSpec spec() {
    PackSpec spec;
    spec.sequences = {{20, 1}, {500, 1}};
    return spec;
  }

  void expect_rejected(const IndexerConfig& config, const std::vector<Defect>& defects) const {
    const Selected right = run(context_for("reference"), config, inputs_);
    ASSERT_TRUE(valid(config, inputs_, right));
    for (const Defect& defect : defects) {
      Selected wrong = right;
      defect.apply(wrong);
      EXPECT_FALSE(valid(config, inputs_, wrong)) << defect.name;
    }
  }

  const RaggedInputs inputs_;
};

TEST_F(SmokeChecker, RejectsWrongSelections) {
  expect_rejected(
      IndexerConfig::dsa(kTopK),
      {{"a position of a short row missing", [](Selected& s) { s.indices[19] = -1; }},
       {"padding that is a position", [](Selected& s) { s.indices[20] = 20; }},
       {"scores of padding", [](Selected& s) { s.scores[20] = 0; }},
       {"a position beyond the row", [](Selected& s) { s.indices[2 * kTopK - 1] = 500; }},
       {"a position twice", [](Selected& s) { s.indices[kTopK + 1] = s.indices[kTopK]; }},
       {"descending", [](Selected& s) { std::swap(s.indices[kTopK], s.indices[kTopK + 1]); }},
       {"a worse position for a better one",
        [](Selected& s) {
          // The neighbour of a selected position that is not selected, with any score.
          auto row = std::span(s.indices).subspan(kTopK);
          const auto gap =
              std::adjacent_find(row.begin(), row.end(), [](auto a, auto b) { return b > a + 1; });
          ++*gap;
        }},
       {"a score off by 2^-12", [](Selected& s) { s.scores[kTopK] *= 1 + 0x1p-12F; }},
       {"a row missing", [](Selected& s) { s.indices.resize(kTopK); }}});
}

TEST_F(SmokeChecker, RejectsWrongRouting) {
  expect_rejected(
      IndexerConfig::misa_r(kTopK, 3),
      {{"a worse head",
        [](Selected& s) {
          const std::int32_t last = s.heads[5];
          s.heads[5] = last == 7 ? 6 : 7;
          std::sort(s.heads.begin() + 3, s.heads.end());
        }},
       {"heads missing", [](Selected& s) { s.heads[5] = -1; }},
       {"a residual entry off by 2^-9", [](Selected& s) { s.residual[64 + 3] *= 1 + 0x1p-9F; }},
       {"no residual",
        [](Selected& s) { std::fill(s.residual.begin(), s.residual.end(), 0.0F); }}});
}

// Bounds that hold for everything prove nothing: they must stay near what fp32 can do.
TEST_F(SmokeChecker, ToleratesLittle) {
  const IndexerConfig config = IndexerConfig::misa_r(kTopK, 3);
  const Rows all = inputs_.all();
  const Problem problem{config, inputs_.q(all), inputs_.w(all), source_of(inputs_.k(all)), {}};
  const BoundedRow row = bounded_row(problem, 1);
  const auto expect_narrow = [](const std::vector<Interval>& intervals, double share) {
    double largest = 0;
    for (const Interval& interval : intervals) {
      largest = std::max(largest, std::abs(interval.high));
    }
    for (const Interval& interval : intervals) {
      EXPECT_LE(interval.high - interval.low, share * largest);
    }
  };
  // gamma_68 of sum |q k|, about sqrt(64) times the score, is 2^-15 of it.
  expect_narrow(all_head_intervals(row), 0x1p-12);
  expect_narrow(block_intervals(row, 64), 0x1p-10);
  // A fit: 8 gamma_136 max|x| to both sides, about 2^-11 of the spread of x, a quarter of which is
  // the nonlinearity.
  expect_narrow(head_intervals(row, config), 0x1p-8);
  expect_narrow(residual_intervals(row, std::vector<std::int32_t>{0, 4}), 0x1p-8);
}

}  // namespace
}  // namespace misa::test
