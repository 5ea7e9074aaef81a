// SPDX-License-Identifier: Apache-2.0
// The C interface to device memory gives the results of the C++ one.
#include <gtest/gtest.h>

#include <cstdint>
#include <numeric>
#include <vector>

#include "common.hpp"
#include "misa/cuda.hpp"
#include "misa/misa.h"

namespace misa::test {
namespace {

constexpr int kTopK = 20;
constexpr std::int64_t kHeads = 8, kDim = 64, kPages = 5, kQueries = 6, kKeys = 200;

using CudaCApi = EachCudaBackend;

#define EXPECT_OK(call) EXPECT_EQ(call, MISA_OK) << misa_last_error()

misa_config c_config() {
  misa_config config{};
  EXPECT_OK(misa_config_by_name("misa", &config));
  config.top_k = kTopK;
  config.heads = 3;
  return config;
}

IndexerConfig config() { return IndexerConfig::misa(kTopK, 3); }

// A cache with its page sums, in device memory.
struct DeviceCache {
  Guarded<std::uint8_t> data{std::vector<std::uint8_t>(kPages * 64 * (kDim + 4))};
  Guarded<float> sums{std::vector<float>(kPages * kDim)};

  [[nodiscard]] CacheSpan span() const { return {data.data(), kPages, kDim, 0, sums.data()}; }
  [[nodiscard]] misa_cache_span c() const {
    misa_cache_span cache{};
    cache.data = data.data();
    cache.pages = kPages;
    cache.dim = kDim;
    cache.page_sums = sums.data();
    return cache;
  }
  [[nodiscard]] misa_cache_view c_view() const {
    misa_cache_view cache{};
    cache.data = data.data();
    cache.pages = kPages;
    cache.dim = kDim;
    cache.page_sums = sums.data();
    return cache;
  }
  [[nodiscard]] bool same_as(const DeviceCache& other) const {
    return data.read() == other.data.read() && sums.read() == other.sums.read();
  }
};

TEST_P(CudaCApi, SmokePlansEqualTheCppInterface) {
  PackSpec spec;
  spec.sequences = {{kKeys, kQueries}};
  spec.heads = kHeads;
  spec.dim = kDim;
  spec.q_dtype = DType::e4m3;
  spec.k_dtype = DType::e4m3;
  const Pack pack = make_pack(spec);
  const Guarded<std::byte> q(pack.q);
  const Guarded<float> w(pack.w);
  const Guarded<std::byte> k(pack.k.front());
  const Guarded<float> scale(pack.scale.front());
  std::vector<std::int32_t> ends(kQueries);
  std::iota(ends.begin(), ends.end(), kKeys - kQueries + 1);
  const Guarded<std::int32_t> ks(std::vector<std::int32_t>(kQueries, 0));
  const Guarded<std::int32_t> ke(ends);

  // The same keys in the first pages of a cache, whose bytes and scales are copied there.
  std::vector<std::uint8_t> pages(kPages * 64 * (kDim + 4));
  for (std::int64_t i = 0; i < kKeys; ++i) {
    std::uint8_t* const page = pages.data() + i / 64 * 64 * (kDim + 4);
    std::memcpy(page + i % 64 * kDim, pack.k.front().data() + i * kDim, kDim);
    std::memcpy(page + 64 * kDim + i % 64 * 4, &pack.scale.front()[i], 4);
  }
  const Guarded<std::uint8_t> cache(pages);
  const Guarded<std::int32_t> table(std::vector<std::int32_t>{0, 1, 2, 3});
  const Guarded<std::int32_t> lens(std::vector<std::int32_t>{kKeys});

  const misa_queries c_q{q.data(), MISA_E4M3, kQueries, kHeads, kDim, 0, 0};
  const misa_weights c_w{w.data(), kQueries, kHeads, 0};
  const Shape shape{kQueries, kHeads, kDim, kKeys, DType::e4m3, DType::e4m3};
  const misa_shape c_shape{kQueries, kHeads, kDim, kKeys, MISA_E4M3, MISA_E4M3};
  for (const bool paged : {false, true}) {
    const cuda::Plan plan(config(), shape,
                          {.total_keys = paged ? 0 : kKeys,
                           .backend = GetParam(),
                           .batch = paged ? 1 : 0,
                           .max_sms = 3});
    misa_cuda_plan_options options{};
    options.total_keys = paged ? 0 : kKeys;
    options.batch = paged ? 1 : 0;
    options.backend = GetParam().c_str();
    options.max_sms = 3;
    misa_cuda_plan* c_plan = nullptr;
    const misa_config from = c_config();
    ASSERT_EQ(misa_cuda_plan_create(&from, &c_shape, &options, &c_plan), MISA_OK)
        << misa_last_error();
    std::size_t bytes = 0;
    EXPECT_OK(misa_cuda_plan_workspace_bytes(c_plan, &bytes));
    EXPECT_EQ(bytes, plan.workspace_bytes());
    const Guarded<std::byte> workspace(bytes);
    const Guarded<std::int32_t> expected(kQueries * kTopK);
    const Guarded<std::int32_t> indices(kQueries * kTopK);
    const Guarded<float> scores(kQueries * kTopK);
    const Queries queries{q.data(), DType::e4m3, kQueries, kHeads, kDim};
    const Weights weights{w.data(), kQueries, kHeads};
    misa_selection out{};
    out.indices = indices.data();
    out.index_count = indices.span().size();
    out.scores = scores.data();
    out.score_count = scores.span().size();
    if (paged) {
      plan.run(queries, weights,
               PagedKeys{{cache.data(), kPages, kDim}, table.data(), 4, 0, lens.span(), kQueries},
               {expected.span(), {}, {}, {}}, workspace.span(), nullptr);
      misa_paged_keys keys{};
      keys.cache.data = cache.data();
      keys.cache.pages = kPages;
      keys.cache.dim = kDim;
      keys.block_table = table.data();
      keys.max_pages = 4;
      keys.context_lens = lens.data();
      keys.batch = 1;
      keys.next_n = kQueries;
      EXPECT_OK(
          misa_cuda_run_paged(c_plan, &c_q, &c_w, &keys, &out, workspace.data(), bytes, nullptr));
      EXPECT_EQ(misa_cuda_run_paged(c_plan, &c_q, &c_w, &keys, &out, workspace.data(), bytes - 1,
                                    nullptr),
                MISA_WORKSPACE);
    } else {
      plan.run(
          queries, weights,
          RaggedKeys{k.data(), DType::e4m3, kKeys, kDim, 0, scale.data(), ks.span(), ke.span()},
          {expected.span(), {}, {}, {}}, workspace.span(), nullptr);
      const misa_ragged_keys keys{k.data(),     MISA_E4M3, kKeys,    kDim,      0,
                                  scale.data(), ks.data(), kQueries, ke.data(), kQueries};
      EXPECT_OK(
          misa_cuda_run_ragged(c_plan, &c_q, &c_w, &keys, &out, workspace.data(), bytes, nullptr));
    }
    expect_success(cudaDeviceSynchronize());
    EXPECT_EQ(indices.read(), expected.read());
    misa_cuda_plan_destroy(c_plan);
  }
}

TEST_P(CudaCApi, SmokeCacheAndTopKEqualTheCppInterface) {
  std::vector<float> values(70 * kDim);
  for (std::size_t i = 0; i < values.size(); ++i) {
    values[i] = static_cast<float>(i * 31 % 977) - 400;
  }
  const Guarded<float> k(values);
  std::vector<std::int64_t> slots(70);
  std::iota(slots.begin(), slots.end(), 30);
  const Guarded<std::int64_t> at(slots);
  const DeviceCache mine;
  const DeviceCache theirs;
  const misa_cache_span c_cache = mine.c();
  const misa_new_keys c_keys{k.data(), MISA_F32, 70, kDim, 0};
  cuda::append(theirs.span(), NewKeys{k.data(), DType::f32, 70, kDim}, at.span(), nullptr,
               ScaleFormat::ue8m0);
  EXPECT_OK(misa_cuda_cache_append(&c_cache, &c_keys, at.data(), 70, MISA_SCALE_UE8M0, nullptr));
  expect_success(cudaDeviceSynchronize());
  EXPECT_TRUE(mine.same_as(theirs));
  expect_success(cudaMemset(mine.sums.data(), 0, mine.sums.span().size_bytes()));
  EXPECT_OK(misa_cuda_cache_append(&c_cache, nullptr, at.data(), 70, MISA_SCALE_F32, nullptr));
  expect_success(cudaDeviceSynchronize());
  EXPECT_TRUE(mine.same_as(theirs));
  expect_success(cudaMemset(mine.sums.data(), 0, mine.sums.span().size_bytes()));
  const Guarded<std::int32_t> pages(std::vector<std::int32_t>{0, 1});
  const Guarded<std::int32_t> filled(std::vector<std::int32_t>{64, 36});
  EXPECT_OK(misa_cuda_cache_rebuild(&c_cache, pages.data(), filled.data(), 2, nullptr));
  expect_success(cudaDeviceSynchronize());
  EXPECT_TRUE(mine.same_as(theirs));
  const Guarded<std::int32_t> targets(std::vector<std::int32_t>{4, 3});
  const misa_cache_view c_view = mine.c_view();
  cuda::copy_pages({theirs.data.data(), kPages, kDim, 0, theirs.sums.data()}, pages.span(),
                   theirs.span(), targets.span(), nullptr);
  EXPECT_OK(
      misa_cuda_cache_copy_pages(&c_view, pages.data(), &c_cache, targets.data(), 2, nullptr));
  expect_success(cudaDeviceSynchronize());
  EXPECT_TRUE(mine.same_as(theirs));

  const Guarded<std::int32_t> expected(7 * kTopK);
  const Guarded<std::int32_t> indices(7 * kTopK);
  const Guarded<float> scores(7 * kTopK);
  cuda::top_k({k.data(), 7, 640}, kTopK, {expected.data()}, nullptr);
  const misa_cuda_logits logits{k.data(), 7, 640, 0, nullptr};
  const misa_cuda_top_k_output out{indices.data(), scores.data(), 0, kTopK};
  EXPECT_OK(misa_cuda_top_k(&logits, kTopK, &out, nullptr));
  expect_success(cudaDeviceSynchronize());
  EXPECT_EQ(indices.read(), expected.read());
}

INSTANTIATE_TEST_SUITE_P(Each, CudaCApi, ::testing::ValuesIn(cuda_backends_of_this_build()),
                         backend_name);

}  // namespace
}  // namespace misa::test
