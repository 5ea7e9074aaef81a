// SPDX-License-Identifier: Apache-2.0
// The forms of an output in device memory: rows with strides, slots of the cache, positions with
// offsets. Each is a function of the plain output, whose values other tests check.
#include <gtest/gtest.h>

#include <cstdint>
#include <functional>
#include <numeric>
#include <span>
#include <string>
#include <vector>

#include "common.hpp"
#include "core/sketch.hpp"
#include "misa/cuda.hpp"
#include "misa/error.hpp"
#include "support/output_forms.hpp"

namespace misa::test {
namespace {

constexpr int kTopK = 48;
constexpr std::int64_t kLongest = 700;

// Queries and weights in device memory.
struct DeviceQueries {
  Guarded<std::byte> q;
  Guarded<float> w;
  Queries queries;
  Weights weights;

  explicit DeviceQueries(const QueryTensors& in)
      : q(std::span(static_cast<const std::byte*>(in.q(in.all()).data),
                    static_cast<std::size_t>(in.tokens() * in.q(in.all()).token_stride) *
                        size_of(in.q(in.all()).dtype))),
        w(std::span(in.w(in.all()).data,
                    static_cast<std::size_t>(in.tokens() * in.w(in.all()).token_stride))),
        queries(in.q(in.all())),
        weights(in.w(in.all())) {
    queries.data = q.data();
    weights.data = w.data();
  }
};

template <class Keys>
FormedOutput run(const cuda::Plan& plan, const DeviceQueries& in, const Keys& k, const Form& form) {
  FormedOutput out(in.queries.tokens, kTopK, form);
  const Guarded<std::int32_t> indices(out.index_array());
  const Guarded<float> scores(out.score_array());
  const Guarded<std::int32_t> offsets(form.offsets);
  const Guarded<std::byte> workspace(plan.workspace_bytes());
  plan.run(in.queries, in.weights, k, out.selection(indices.span(), scores.span(), offsets.span()),
           workspace.span(), nullptr);
  expect_success(cudaDeviceSynchronize());
  (void)workspace.read();
  out.index_array() = indices.read();
  out.score_array() = scores.read();
  return out;
}

// Writes the sketches of all pages of a cache in device memory and adds them to its view.
void add_sketches(CacheView& cache, int sketch, const Guarded<std::uint8_t>& sketches,
                  std::uint8_t* data) {
  CacheSpan span{data, cache.pages, cache.dim, cache.page_stride};
  span.page_size = cache.page_size;
  cache.sketch = span.sketch = sketches.data();
  cache.sketch_bits = span.sketch_bits = sketch;
  std::vector<std::int32_t> pages(static_cast<std::size_t>(cache.pages));
  std::iota(pages.begin(), pages.end(), 0);
  const Guarded<std::int32_t> all{std::span<const std::int32_t>(pages)};
  cuda::rebuild(span, all.span(), {}, nullptr);
  expect_success(cudaDeviceSynchronize());
}

// The sketched ones are of keys of e4m3.
std::vector<NamedConfig> configs(DType k_dtype) {
  std::vector<NamedConfig> all = named_configs(kTopK, 3);
  for (const int sketch : {2, 4}) {
    if (k_dtype == DType::e4m3) {
      IndexerConfig sketched = IndexerConfig::misa_r(kTopK, 3, 100);
      sketched.sketch = sketch;
      all.push_back({"misa-r, " + std::to_string(sketch) + "-bit", sketched});
    }
  }
  return all;
}

using CudaOutputForms = EachCudaBackend;

TEST_P(CudaOutputForms, RaggedSmoke) {
  for (const DType dtype : {DType::e4m3, DType::bf16}) {
    PackSpec spec;
    spec.sequences = {{17, 3}, {kLongest, 5}, {2, 4}, {90, 2}};
    spec.q_dtype = dtype;
    spec.k_dtype = dtype;
    spec.dim = dtype == DType::e4m3 ? 128 : 64;  // those of Hopper's own kernels, too
    const RaggedInputs in(make_pack(spec));
    RaggedKeys keys = in.k(in.all());
    const std::vector<std::int32_t> host_starts(keys.starts.begin(), keys.starts.end());
    const Guarded<std::byte> k(
        std::span(static_cast<const std::byte*>(keys.data),
                  static_cast<std::size_t>(keys.tokens * keys.dim) * size_of(dtype)));
    const Guarded<float> scale(
        std::span(keys.scale, keys.scale != nullptr ? static_cast<std::size_t>(keys.tokens) : 0));
    const Guarded<std::int32_t> starts(keys.starts);
    const Guarded<std::int32_t> ends(keys.ends);
    keys.data = k.data();
    keys.scale = keys.scale != nullptr ? scale.data() : nullptr;
    keys.starts = starts.span();
    keys.ends = ends.span();
    const DeviceQueries queries(in);
    for (const NamedConfig& named : configs(dtype)) {
      const cuda::Plan plan(named.config,
                            {in.tokens(), spec.heads, spec.dim, kLongest, dtype, dtype},
                            {.total_keys = keys.tokens, .backend = GetParam()});
      const FormedOutput plain = run(plan, queries, keys, {});
      for (const Form& form : ragged_forms(kTopK, host_starts)) {
        const FormedOutput out = run(plan, queries, keys, form);
        EXPECT_EQ(out.indices(), plain.with_offsets(form.offsets)) << named.name << form.name;
        EXPECT_TRUE(out.same_scores(plain)) << named.name << form.name;
        EXPECT_TRUE(out.padding_untouched()) << named.name << form.name;
      }
    }
  }
}

// Some entries of the block table name no page: their keys score NaN, and where they are selected
// all the same, as in rows of at most top_k keys, their slots are -1.
TEST_P(CudaOutputForms, PagedSmoke) {
  PackSpec spec;
  spec.q_dtype = DType::e4m3;
  spec.k_dtype = DType::e4m3;
  for (const std::int64_t page_size : {32, 64, 128}) {
    spec.dim = page_size == 32 ? 64 : 128;
    for (const Lengths lengths : {Lengths::next_n, Lengths::query_starts}) {
      spec.sequences = {{33, 3}, {kLongest, 3}, {0, 3}, {129, 3}};
      if (lengths == Lengths::query_starts) {
        spec.sequences = {{33, 1}, {kLongest, 4}, {0, 2}, {129, 5}};
      }
      const PagedInputs in(
          make_pack(spec),
          {.shuffle = 3, .padding = 16, .page_size = page_size, .lengths = lengths});
      PagedKeys keys = in.k(in.all());
      std::vector<std::int32_t> table(
          keys.block_table, keys.block_table + 3 * keys.block_table_stride + keys.max_pages);
      table[(32 / page_size)] = -1;
      table[keys.block_table_stride + 1] = static_cast<std::int32_t>(keys.cache.pages);
      const Guarded<std::uint8_t> cache(std::span(
          keys.cache.data, static_cast<std::size_t>(keys.cache.pages * keys.cache.page_stride)));
      const Guarded<std::int32_t> block_table(table);
      const Guarded<std::int32_t> context_lens(keys.context_lens);
      const Guarded<std::int32_t> query_starts(keys.query_starts);
      keys.cache.data = cache.data();
      keys.cache.page_sums = nullptr;
      keys.block_table = block_table.data();
      keys.context_lens = context_lens.span();
      keys.query_starts = query_starts.span();
      const DeviceQueries queries(in);
      for (const NamedConfig& named : configs(spec.k_dtype)) {
        const int sketch = named.config.sketch;
        const Guarded<std::uint8_t> sketches(
            sketch == 0 ? 0
                        : static_cast<std::size_t>(keys.cache.pages *
                                                   sketch_page_bytes(sketch, spec.dim, page_size)));
        PagedKeys read = keys;
        if (sketch != 0) {
          add_sketches(read.cache, sketch, sketches, cache.data());
        }
        const cuda::Plan plan(
            named.config, {in.tokens(), spec.heads, spec.dim, kLongest, spec.q_dtype, DType::e4m3},
            {.backend = GetParam(), .batch = 4});
        const FormedOutput plain = run(plan, queries, read, {});
        const std::vector<std::int32_t> slots = plain.slots(keys, sequences_of(spec), table);
        EXPECT_NE(slots, plain.indices());
        for (const Form& form : paged_forms(kTopK, in.tokens())) {
          const FormedOutput out = run(plan, queries, read, form);
          EXPECT_EQ(out.indices(), form.slots ? slots : plain.with_offsets(form.offsets))
              << named.name << form.name << ", pages of " << page_size;
          EXPECT_TRUE(out.same_scores(plain)) << named.name << form.name;
          EXPECT_TRUE(out.padding_untouched()) << named.name << form.name;
        }
      }
    }
  }
}

// Of rows in registers, of a thread block each and of a cluster each.
TEST_P(CudaOutputForms, SmokeTopK) {
  struct Size {
    std::int64_t rows;
    std::int64_t columns;
  };
  for (const auto& [rows, columns] : {Size{3, 100}, Size{200, 20000}, Size{2, 200000}}) {
    std::vector<float> values(static_cast<std::size_t>(rows * columns));
    for (std::size_t i = 0; i < values.size(); ++i) {
      values[i] = static_cast<float>(i * 7919 % 10007);
    }
    const Guarded<float> logits(values);
    const auto select = [&](const Form& form) {
      FormedOutput out(rows, kTopK, form);
      const Guarded<std::int32_t> indices(out.index_array());
      const Guarded<float> scores(out.score_array());
      const Selection views = out.selection(indices.span(), scores.span(), {});
      cuda::top_k({logits.data(), rows, columns}, kTopK,
                  {indices.data(), form.scores ? scores.data() : nullptr, views.index_stride,
                   views.score_stride},
                  nullptr);
      expect_success(cudaDeviceSynchronize());
      out.index_array() = indices.read();
      out.score_array() = scores.read();
      return out;
    };
    const FormedOutput plain = select({});
    for (const Form& form : strided_forms(kTopK)) {
      const FormedOutput out = select(form);
      EXPECT_EQ(out.indices(), plain.indices()) << columns << form.name;
      EXPECT_TRUE(out.same_scores(plain)) << columns << form.name;
      EXPECT_TRUE(out.padding_untouched()) << columns << form.name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(Each, CudaOutputForms, ::testing::ValuesIn(cuda_backends_of_this_build()),
                         backend_name);

}  // namespace
}  // namespace misa::test
