// SPDX-License-Identifier: Apache-2.0
// Every indexer of every backend against the reference over generated shapes.
#include <algorithm>
#include <tuple>

#include "common.hpp"

namespace misa::test {
namespace {

constexpr int kTopK = 64;
constexpr DType kDTypes[]{DType::f32, DType::bf16, DType::e4m3};

struct ShapeCase {
  std::string backend;
  std::int64_t heads;
  std::int64_t dim;
  DType q_dtype;
  DType k_dtype;
};

std::string name_of(const ShapeCase& shape) {
  return identifier(shape.backend) + "_H" + std::to_string(shape.heads) + "_D" +
         std::to_string(shape.dim) + "_" + name_of(shape.q_dtype) + "_" + name_of(shape.k_dtype);
}

// How GoogleTest prints the parameter.
void PrintTo(const ShapeCase& shape, std::ostream* out) { *out << name_of(shape); }

std::string shape_name(const ::testing::TestParamInfo<ShapeCase>& info) {
  return name_of(info.param);
}

class Shapes : public ::testing::TestWithParam<ShapeCase> {
 protected:
  // Checks a pack of sequences of these lengths, ragged with padded strides and, for e4m3, paged.
  void check(const std::vector<std::int64_t>& lengths, std::int64_t queries) const {
    const ShapeCase& shape = GetParam();
    PackSpec spec;
    for (const std::int64_t n : lengths) {
      spec.sequences.push_back({n, queries});
    }
    spec.heads = shape.heads;
    spec.dim = shape.dim;
    spec.q_dtype = shape.q_dtype;
    spec.k_dtype = shape.k_dtype;
    const Pack pack = make_pack(spec);
    const RaggedInputs ragged(pack, 4);
    const Context context = context_for(shape.backend);
    const int routed = static_cast<int>(std::min<std::int64_t>(3, shape.heads));
    for (const NamedConfig& named : named_configs(kTopK, routed)) {
      const Selected result = run(context, named.config, ragged);
      ASSERT_TRUE(valid(named.config, ragged, result, shape.backend)) << named.name;
      if (shape.k_dtype == DType::e4m3) {
        const PagedInputs paged(pack, {7, 4, true});
        EXPECT_TRUE(same_bits(run(context, named.config, paged), result)) << named.name;
      }
    }
  }
};

// Lengths near multiples of the page size, the block size (128) and k (64).
TEST_P(Shapes, MatchTheReferenceAroundEveryBoundary) {
  check({0,   1,   2,   63,  64,  65,  127, 128, 129,  191,  192,  193,  255,  256,
         257, 320, 383, 511, 512, 513, 640, 769, 1023, 1024, 1025, 1536, 2049, 3000},
        1);
}

TEST_P(Shapes, MatchTheReferenceWithSeveralQueriesASequence) {
  check({0, 1, 2, 3, 64, 66, 128, 130, 258, 515, 1026}, 3);
}

std::vector<ShapeCase> every_shape() {
  std::vector<ShapeCase> cases;
  for (const std::string& backend : available_backends()) {
    for (const std::int64_t heads : {1, 8, 32, 64}) {
      for (const std::int64_t dim : {64, 128}) {
        // All sizes with equal dtypes, and all pairs of dtypes at one size.
        const DType dtype = kDTypes[(heads + dim / 64) % 3];
        cases.push_back({backend, heads, dim, dtype, dtype});
      }
    }
    for (const DType q : kDTypes) {
      for (const DType k : kDTypes) {
        cases.push_back({backend, 5, 64, q, k});
      }
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Every, Shapes, ::testing::ValuesIn(every_shape()), shape_name);

class SmokeShapes : public Shapes {};

TEST_P(SmokeShapes, MatchTheReference) { check({0, 1, 63, 64, 65, 129, 200, 321}, 2); }

std::vector<ShapeCase> smoke_shapes() {
  std::vector<ShapeCase> cases;
  for (const std::string& backend : available_backends()) {
    for (const DType dtype : kDTypes) {
      cases.push_back({backend, 4, 64, dtype, dtype});
    }
  }
  return cases;
}

INSTANTIATE_TEST_SUITE_P(Each, SmokeShapes, ::testing::ValuesIn(smoke_shapes()), shape_name);

class Lengths : public EachBackend {};

// The published sizes: k of 512, blocks of 1024, HISA's 128 x 64.
TEST_P(Lengths, PublishedIndexersMatchTheReference) {
  PackSpec spec;
  spec.sequences = {{511, 1}, {513, 2}, {1025, 1}, {2049, 1}, {9000, 2}};
  spec.heads = 16;
  spec.dim = 128;
  spec.q_dtype = DType::bf16;
  spec.k_dtype = DType::bf16;
  const RaggedInputs inputs(make_pack(spec));
  for (const std::string_view name : indexer_names()) {
    IndexerConfig config = indexer_by_name(name, 512);
    config.candidates = std::min(config.candidates, 2048);
    EXPECT_TRUE(valid(config, inputs, run(context(), config, inputs))) << name;
  }
}

TEST_P(Lengths, IndexersMatchTheReferenceAroundEveryPage) {
  PackSpec spec;
  for (std::int64_t page = kPageSize; page <= 3000; page += kPageSize) {
    for (const std::int64_t n : {page - 1, page, page + 1}) {
      spec.sequences.push_back({n, 1});
    }
  }
  spec.heads = 2;
  const RaggedInputs inputs(make_pack(spec));
  for (const NamedConfig& named : named_configs(kTopK, 1)) {
    // Checking a re-rank takes n^2 comparisons, so only the shapes above do it.
    if (named.config.candidates == 0) {
      EXPECT_TRUE(valid(named.config, inputs, run(context(), named.config, inputs))) << named.name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Each, Lengths, ::testing::ValuesIn(available_backends()), backend_name);

}  // namespace
}  // namespace misa::test
