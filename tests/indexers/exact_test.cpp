// SPDX-License-Identifier: Apache-2.0
// Inputs of small integers, for which fp32 is exact: every backend equals the reference bit for
// bit, ties included.
#include "common.hpp"

namespace misa::test {
namespace {

class Exact : public EachBackend {};

TEST_P(Exact, IntegersGiveTheReferencesBits) {
  for (const DType q_dtype : {DType::f32, DType::bf16, DType::e4m3}) {
    for (const DType k_dtype : {DType::f32, DType::bf16, DType::e4m3}) {
      PackSpec spec;
      spec.sequences = {{0, 1}, {33, 1}, {64, 2}, {129, 1}, {700, 3}};
      spec.values = Values::integers;
      spec.q_dtype = q_dtype;
      spec.k_dtype = k_dtype;
      const RaggedInputs inputs(make_pack(spec));
      for (const NamedConfig& named : compositions(32, 3)) {
        // Means of partial blocks, fits and deviations are not exact.
        const Router router = named.config.router;
        if (named.config.residual || named.config.filter_block > 0 || router == Router::pooled ||
            router == Router::nonlinearity || router == Router::dispersion) {
          continue;
        }
        EXPECT_TRUE(same_bits(run(context(), named.config, inputs),
                              run(context_for("reference"), named.config, inputs)))
            << named.name << ' ' << name_of(q_dtype) << ' ' << name_of(k_dtype);
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Each, Exact, ::testing::ValuesIn(available_backends()), backend_name);

}  // namespace
}  // namespace misa::test
