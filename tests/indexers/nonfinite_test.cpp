// SPDX-License-Identifier: Apache-2.0
// NaN and infinities in q, k, w and scales: rows that hold them stay valid, others do not change.
#include <cmath>
#include <functional>
#include <limits>

#include "common.hpp"

namespace misa::test {
namespace {

constexpr int kTopK = 40;
constexpr float kInfinity = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The second of three sequences is poisoned, in its second query or in a key in its middle.
constexpr std::int64_t kQueries = 3;
constexpr Rows kBefore{0, kQueries};
constexpr Rows kAfter{2 * kQueries, kQueries};
constexpr std::int64_t kQuery = kQueries + 1;

struct Poison {
  std::string name;
  std::function<void(Pack&)> apply;
};

std::vector<Poison> poisons(const std::vector<float>& values, DType q_dtype, DType k_dtype) {
  std::vector<Poison> all;
  for (const float value : values) {
    const std::string suffix = " = " + std::to_string(value);
    all.push_back({"w" + suffix, [=](Pack& pack) { pack.w[kQuery * 8 + 2] = value; }});
    // e4m3 saturates everything but NaN.
    if (q_dtype != DType::e4m3 || std::isnan(value)) {
      all.push_back({"q" + suffix, [=](Pack& pack) { pack.set_q(kQuery, 2, 5, value); }});
    }
    if (k_dtype != DType::e4m3 || std::isnan(value)) {
      // A sampled key, one that is not sampled, and the last one that the first query sees.
      for (const std::int64_t position : {0, 301, 597}) {
        all.push_back({"k[" + std::to_string(position) + "]" + suffix,
                       [=](Pack& pack) { pack.set_k(1, position, 9, value); }});
      }
    }
    if (k_dtype == DType::e4m3) {
      all.push_back({"scale" + suffix, [=](Pack& pack) { pack.scale[1][300] = value; }});
    }
  }
  all.push_back({"q of a whole query = NaN", [](Pack& pack) {
                   for (std::int64_t i = 0; i < 8 * 64; ++i) {
                     pack.set_q(kQuery, i / 64, i % 64, kNaN);
                   }
                 }});
  all.push_back({"every key = NaN", [](Pack& pack) {
                   for (std::int64_t i = 0; i < 600 * 64; ++i) {
                     pack.set_k(1, i / 64, i % 64, kNaN);
                   }
                 }});
  return all;
}

class NonFinite : public EachBackend {
 protected:
  void check(DType q_dtype, DType k_dtype, const std::vector<NamedConfig>& configs,
             const std::vector<float>& values = {kNaN, kInfinity, -kInfinity, 3e38F,
                                                 -3e38F}) const {
    PackSpec spec;
    spec.sequences = {{200, kQueries}, {600, kQueries}, {64, kQueries}};
    spec.q_dtype = q_dtype;
    spec.k_dtype = k_dtype;
    const Pack clean = make_pack(spec);
    for (const NamedConfig& named : configs) {
      const Selected wanted = run(context(), named.config, RaggedInputs(clean));
      for (const Poison& poison : poisons(values, q_dtype, k_dtype)) {
        Pack pack = clean;
        poison.apply(pack);
        const RaggedInputs inputs(pack);
        const Selected result = run(context(), named.config, inputs);
        const std::string what = named.name + ", " + poison.name;
        EXPECT_TRUE(same_bits(slice(result, kBefore), slice(wanted, kBefore))) << what;
        EXPECT_TRUE(same_bits(slice(result, kAfter), slice(wanted, kAfter))) << what;
        EXPECT_TRUE(valid(named.config, inputs, result)) << what;
      }
    }
  }
};

TEST_P(NonFinite, IndexersOnF32) { check(DType::f32, DType::f32, named_configs(kTopK, 3)); }

TEST_P(NonFinite, IndexersOnE4m3) { check(DType::bf16, DType::e4m3, named_configs(kTopK, 3)); }

TEST_P(NonFinite, SketchesOfE4m3Keys) {
  check(DType::bf16, DType::e4m3, sketched_configs(kTopK, 3));
  check(DType::e4m3, DType::e4m3, sketched_configs(kTopK, 3));
}

TEST_P(NonFinite, IndexersOnBf16) { check(DType::bf16, DType::bf16, named_configs(kTopK, 3)); }

TEST_P(NonFinite, IndexersOnE4m3Queries) {
  check(DType::e4m3, DType::e4m3, named_configs(kTopK, 3));
}

TEST_P(NonFinite, Compositions) {
  check(DType::f32, DType::f32, compositions(kTopK, 3), {kNaN, kInfinity});
}

// A NaN in one query does not change its neighbours in the same sequence.
TEST_P(NonFinite, SmokeAQueryDoesNotReachItsNeighbours) {
  PackSpec spec;
  spec.sequences = {{600, kQueries}};
  const Pack clean = make_pack(spec);
  Pack pack = clean;
  pack.set_q(1, 3, 7, kNaN);
  pack.w[8] = kInfinity;
  for (const NamedConfig& named : compositions(kTopK, 3)) {
    const Selected wanted = run(context(), named.config, RaggedInputs(clean));
    const Selected result = run(context(), named.config, RaggedInputs(pack));
    for (const std::int64_t t : {0, 2}) {
      EXPECT_TRUE(same_bits(slice(result, {t, 1}), slice(wanted, {t, 1}))) << named.name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Each, NonFinite, ::testing::ValuesIn(available_backends()), backend_name);

}  // namespace
}  // namespace misa::test
