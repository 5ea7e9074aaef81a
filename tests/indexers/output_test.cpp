// SPDX-License-Identifier: Apache-2.0
// The forms of an output: rows with strides, slots of the cache, positions with offsets. Each is a
// function of the plain output, whose values other tests check.
#include <gtest/gtest.h>

#include <cstdint>
#include <vector>

#include "common.hpp"
#include "core/workspace.hpp"
#include "support/output_forms.hpp"

namespace misa::test {
namespace {

constexpr int kTopK = 40;

class OutputForms : public EachBackend {
 protected:
  template <class Keys>
  FormedOutput run(const IndexerConfig& config, const Queries& q, const Weights& w, const Keys& k,
                   DType k_dtype, const Form& form) const {
    FormedOutput out(q.tokens, config.top_k, form);
    const Plan plan(context(2), config, {q.tokens, q.heads, q.dim, kLongest, q.dtype, k_dtype});
    const OwnWorkspace workspace(plan.workspace_bytes());
    plan.run(q, w, k, out.selection(form.offsets), workspace.span());
    return out;
  }

  static constexpr std::int64_t kLongest = 400;
};

TEST_P(OutputForms, RaggedSmoke) {
  PackSpec spec;
  spec.sequences = {{17, 3}, {400, 5}, {2, 4}, {90, 2}};
  const RaggedInputs in(make_pack(spec), 3);
  const Rows all = in.all();
  const RaggedKeys keys = in.k(all);
  for (const NamedConfig& named : named_configs(kTopK, 3)) {
    const auto run_as = [&](const Form& form) {
      return run(named.config, in.q(all), in.w(all), keys, spec.k_dtype, form);
    };
    const FormedOutput plain = run_as({});
    for (const Form& form : ragged_forms(kTopK, keys.starts)) {
      const FormedOutput out = run_as(form);
      EXPECT_EQ(out.indices(), plain.with_offsets(form.offsets)) << named.name << form.name;
      EXPECT_TRUE(out.same_scores(plain)) << named.name << form.name;
      EXPECT_TRUE(out.padding_untouched()) << named.name << form.name;
    }
  }
}

TEST_P(OutputForms, PagedSmoke) {
  PackSpec spec;
  spec.k_dtype = DType::e4m3;
  for (const std::int64_t page_size : {32, 64, 128}) {
    for (const Lengths lengths : {Lengths::next_n, Lengths::query_starts}) {
      spec.sequences = {{17, 3}, {400, 3}, {0, 3}, {129, 3}};
      if (lengths == Lengths::query_starts) {
        spec.sequences = {{17, 1}, {400, 4}, {0, 2}, {129, 5}};
      }
      const PagedInputs in(
          make_pack(spec),
          {.shuffle = 3, .padding = 4, .page_size = page_size, .lengths = lengths});
      const Rows all = in.all();
      const PagedKeys keys = in.k(all);
      const std::vector<std::int32_t> sequences = sequences_of(spec);
      const std::vector<std::int32_t> table(
          keys.block_table, keys.block_table + 3 * keys.block_table_stride + keys.max_pages);
      for (const NamedConfig& named : named_configs(kTopK, 3)) {
        const auto run_as = [&](const Form& form) {
          return run(named.config, in.q(all), in.w(all), keys, spec.k_dtype, form);
        };
        const FormedOutput plain = run_as({});
        const std::vector<std::int32_t> slots = plain.slots(keys, sequences, table);
        for (const Form& form : paged_forms(kTopK, in.tokens())) {
          const FormedOutput out = run_as(form);
          EXPECT_EQ(out.indices(), form.slots ? slots : plain.with_offsets(form.offsets))
              << named.name << form.name << ", pages of " << page_size;
          EXPECT_TRUE(out.same_scores(plain)) << named.name << form.name;
          EXPECT_TRUE(out.padding_untouched()) << named.name << form.name;
        }
      }
    }
  }
}

INSTANTIATE_TEST_SUITE_P(All, OutputForms, ::testing::ValuesIn(available_backends()), backend_name);

}  // namespace
}  // namespace misa::test
