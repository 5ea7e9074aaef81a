// SPDX-License-Identifier: Apache-2.0
// The C interface gives the results of the C++ one, and on failure only a status and a message.
#include <gmock/gmock.h>

#include <cstring>
#include <string>
#include <thread>
#include <vector>

#include "core/workspace.hpp"
#include "misa/misa.h"
#include "misa/misa.hpp"
#include "support/check.hpp"
#include "support/inputs.hpp"
#include "support/output_forms.hpp"

extern "C" int misa_c_program();

namespace misa {
namespace {

using ::testing::HasSubstr;
using ::testing::StartsWith;

// The handles that a test uses.
struct Handles {
  misa_context* context = nullptr;
  misa_plan* plan = nullptr;

  Handles() = default;
  Handles(const Handles&) = delete;
  Handles& operator=(const Handles&) = delete;
  ~Handles() {
    misa_plan_destroy(plan);
    misa_context_destroy(context);
  }
};

misa_queries c_queries(const Queries& q) {
  return {
      q.data,       static_cast<std::int32_t>(q.dtype), q.tokens, q.heads, q.dim, q.token_stride,
      q.head_stride};
}

misa_weights c_weights(const Weights& w) { return {w.data, w.tokens, w.heads, w.token_stride}; }

// The outputs of a routed indexer with a residual row.
struct Outputs {
  Selected selected;

  Outputs(std::int64_t tokens, const IndexerConfig& config, std::int64_t dim) {
    const auto rows = static_cast<std::size_t>(tokens);
    selected.tokens = tokens;
    selected.top_k = config.top_k;
    selected.indices.resize(rows * static_cast<std::size_t>(config.top_k));
    selected.scores.resize(selected.indices.size());
    selected.heads.resize(rows * static_cast<std::size_t>(config.heads));
    selected.residual.resize(rows * static_cast<std::size_t>(dim));
  }

  misa_selection c() {
    misa_selection out{};
    out.indices = selected.indices.data();
    out.index_count = selected.indices.size();
    out.scores = selected.scores.data();
    out.score_count = selected.scores.size();
    out.heads = selected.heads.data();
    out.head_count = selected.heads.size();
    out.residual = selected.residual.data();
    out.residual_count = selected.residual.size();
    return out;
  }
};

// One of the two sequences below is dense, the other is not.
constexpr std::int64_t kDenseWork = 8 * 100;

const IndexerConfig kConfig = [] {
  IndexerConfig config = IndexerConfig::automatic(20);
  config.dense_work = kDenseWork;
  return config;
}();

misa_config c_config() {
  misa_config config{};
  EXPECT_EQ(misa_config_by_name("auto", &config), MISA_OK);
  config.top_k = 20;
  config.candidates = 40;
  config.dense_work = kDenseWork;
  return config;
}

test::Pack pack() {
  return test::make_pack({.sequences = {{150, 4}, {90, 4}},
                          .heads = 8,
                          .dim = 64,
                          .q_dtype = DType::bf16,
                          .k_dtype = DType::e4m3});
}

// Creates the context and the plan of the shape that `pack` has.
void create(Handles& handles, std::size_t& workspace_bytes) {
  ASSERT_EQ(misa_context_create(nullptr, &handles.context), MISA_OK);
  const misa_config config = c_config();
  const misa_shape shape{8, 8, 64, 150, MISA_BF16, MISA_E4M3};
  ASSERT_EQ(misa_plan_create(handles.context, &config, &shape, &handles.plan), MISA_OK);
  ASSERT_EQ(misa_plan_workspace_bytes(handles.plan, &workspace_bytes), MISA_OK);
}

TEST(CApi, ACProgramRunsSmoke) { EXPECT_EQ(misa_c_program(), 0); }

TEST(CApi, RaggedEqualsTheCppInterface) {
  const test::RaggedInputs inputs(pack(), 4);
  const Queries q = inputs.q(inputs.all());
  const Weights w = inputs.w(inputs.all());
  const RaggedKeys k = inputs.k(inputs.all());
  const Selected expected = select(Context(), kConfig, q, w, k, {true, true, true});

  Handles handles;
  std::size_t bytes = 0;
  create(handles, bytes);
  const OwnWorkspace workspace(bytes);
  Outputs outputs(q.tokens, kConfig, q.dim);
  const misa_queries queries = c_queries(q);
  const misa_weights weights = c_weights(w);
  const misa_ragged_keys keys{k.data,         MISA_E4M3,    k.tokens,        k.dim,
                              k.token_stride, k.scale,      k.starts.data(), k.starts.size(),
                              k.ends.data(),  k.ends.size()};
  const misa_selection out = outputs.c();
  ASSERT_EQ(misa_run_ragged(handles.plan, &queries, &weights, &keys, &out, workspace.span().data(),
                            bytes),
            MISA_OK)
      << misa_last_error();
  EXPECT_TRUE(test::same_bits(outputs.selected, expected));
}

void expect_paged_equal(const test::PageLayout& layout) {
  const test::PagedInputs inputs(pack(), layout);
  const Queries q = inputs.q(inputs.all());
  const Weights w = inputs.w(inputs.all());
  const PagedKeys k = inputs.k(inputs.all());
  const Selected expected = select(Context(), kConfig, q, w, k, {true, true, true});

  Handles handles;
  std::size_t bytes = 0;
  create(handles, bytes);
  const OwnWorkspace workspace(bytes);
  Outputs outputs(q.tokens, kConfig, q.dim);
  const misa_queries queries = c_queries(q);
  const misa_weights weights = c_weights(w);
  const bool default_size = k.cache.page_size == 64;
  const misa_paged_keys keys{
      {k.cache.data, k.cache.pages, k.cache.dim, k.cache.page_stride, k.cache.page_sums,
       default_size ? 0 : k.cache.page_size, k.cache.page_sums_stride, k.cache.largest_scales,
       k.cache.largest_scales_stride, k.cache.sketch, k.cache.sketch_bits, k.cache.sketch_stride},
      k.block_table,
      k.max_pages,
      k.block_table_stride,
      k.context_lens.data(),
      k.context_lens.size(),
      k.next_n,
      k.query_starts.data(),
      k.query_starts.size(),
      k.row_lens.data(),
      k.row_lens.size()};
  const misa_selection out = outputs.c();
  ASSERT_EQ(
      misa_run_paged(handles.plan, &queries, &weights, &keys, &out, workspace.span().data(), bytes),
      MISA_OK)
      << misa_last_error();
  EXPECT_TRUE(test::same_bits(outputs.selected, expected));
}

TEST(CApi, PagedEqualsTheCppInterface) {
  using test::Lengths;
  expect_paged_equal({.shuffle = 3, .padding = 2, .page_sums = true});
  expect_paged_equal({.page_size = 32, .lengths = Lengths::query_starts});
  expect_paged_equal({.shuffle = 4,
                      .page_sums = true,
                      .page_size = 128,
                      .tail = true,
                      .lengths = Lengths::starts_and_rows});
}

// Rows with strides, offsets and slots: each form is what the plain output makes of it.
TEST(CApi, OutputsHaveForms) {
  const test::PagedInputs inputs(pack());
  const Queries q = inputs.q(inputs.all());
  const Weights w = inputs.w(inputs.all());
  const PagedKeys k = inputs.k(inputs.all());
  const Selected plain = select(Context(), kConfig, q, w, k, {.scores = true});

  Handles handles;
  std::size_t bytes = 0;
  create(handles, bytes);
  const OwnWorkspace workspace(bytes);
  const misa_queries queries = c_queries(q);
  const misa_weights weights = c_weights(w);
  misa_paged_keys keys{};
  keys.cache.data = k.cache.data;
  keys.cache.pages = k.cache.pages;
  keys.cache.dim = k.cache.dim;
  keys.block_table = k.block_table;
  keys.max_pages = k.max_pages;
  keys.context_lens = k.context_lens.data();
  keys.batch = k.context_lens.size();
  keys.next_n = k.next_n;
  const std::vector<std::int32_t> offsets{0, 1, 2, 3, 400, 500, 600, -700};
  for (const test::Form& form :
       {test::Form{"offsets", 5, 2, true, false, offsets}, test::Form{"slots", 1, 3, true, true}}) {
    test::FormedOutput written(q.tokens, kConfig.top_k, form);
    misa_selection out{};
    out.indices = written.index_array().data();
    out.index_count = written.index_array().size();
    out.scores = written.score_array().data();
    out.score_count = written.score_array().size();
    out.index_stride = kConfig.top_k + form.index_padding;
    out.score_stride = kConfig.top_k + form.score_padding;
    out.slots = form.slots ? 1 : 0;
    out.offsets = form.offsets.data();
    out.offset_count = form.offsets.size();
    ASSERT_EQ(misa_run_paged(handles.plan, &queries, &weights, &keys, &out, workspace.span().data(),
                             bytes),
              MISA_OK)
        << misa_last_error();
    test::FormedOutput expected(q.tokens, kConfig.top_k, {});
    expected.index_array() = plain.indices;
    expected.score_array() = plain.scores;
    const std::vector<std::int32_t> table(k.block_table, k.block_table + 2 * k.max_pages);
    EXPECT_EQ(written.indices(), form.slots ? expected.slots(k, {{0, 0, 0, 0, 1, 1, 1, 1}}, table)
                                            : expected.with_offsets(offsets))
        << form.name;
    EXPECT_TRUE(written.same_scores(expected)) << form.name;
    EXPECT_TRUE(written.padding_untouched()) << form.name;
  }
}

TEST(CApi, MeansEqualTheCppInterface) {
  const test::RaggedInputs inputs(pack(), 4);
  const Queries q = inputs.q(inputs.all());
  const Weights w = inputs.w(inputs.all());
  const std::int64_t dim = q.dim;
  std::vector<float> rows(static_cast<std::size_t>(20 * dim));
  for (std::size_t i = 0; i < rows.size(); ++i) {
    rows[i] = static_cast<float>(i * i % 89) - 44.0F;
  }
  const std::vector<std::int32_t> starts{0, 0, 3, 3, 3, 9, 0, 2};
  const std::vector<std::int32_t> ends{15, 9, 20, 19, 3, 8, 20, 12};
  const std::vector<std::int32_t> partial{16, -1, -1, 0, -1, 4, 19, 1};
  const RaggedMeans view{rows.data(), 20, dim, 0, starts, ends, partial};
  std::vector<std::int32_t> heads(8 * 3);
  std::vector<std::int32_t> blocks(8 * 5);
  const Context context;
  route_from_means(context, q, w, view, 3, heads);
  keep_blocks_from_means(context, q, w, view, 5, blocks);

  Handles handles;
  ASSERT_EQ(misa_context_create(nullptr, &handles.context), MISA_OK);
  const misa_queries queries = c_queries(q);
  const misa_weights weights = c_weights(w);
  const misa_ragged_means means{rows.data(),    20, dim, 0, starts.data(), 8, ends.data(), 8,
                                partial.data(), 8};
  std::vector<std::int32_t> c_heads(heads.size());
  std::vector<std::int32_t> c_blocks(blocks.size());
  ASSERT_EQ(misa_route_from_means(handles.context, &queries, &weights, &means, 3, c_heads.data(),
                                  c_heads.size()),
            MISA_OK)
      << misa_last_error();
  ASSERT_EQ(misa_keep_blocks_from_means(handles.context, &queries, &weights, &means, 5,
                                        c_blocks.data(), c_blocks.size()),
            MISA_OK)
      << misa_last_error();
  EXPECT_EQ(c_heads, heads);
  EXPECT_EQ(c_blocks, blocks);
}

TEST(CApi, CacheEqualsTheCppInterface) {
  constexpr std::int64_t kTokens = 70;
  std::vector<float> k(kTokens * 64);
  std::vector<std::int64_t> slots(kTokens);
  for (std::size_t i = 0; i < k.size(); ++i) {
    k[i] = static_cast<float>(i % 97) - 48.0F;
  }
  for (std::size_t i = 0; i < slots.size(); ++i) {
    slots[i] = static_cast<std::int64_t>(i);
  }
  std::int64_t bytes = 0;
  ASSERT_EQ(misa_cache_bytes(4, 64, 0, &bytes), MISA_OK);
  ASSERT_EQ(bytes, cache_bytes(4, 64));
  std::vector<std::uint8_t> data(static_cast<std::size_t>(bytes));
  std::vector<std::uint8_t> expected_data(data.size());
  std::vector<float> sums(4 * 64);
  std::vector<float> expected_sums(4 * 64);
  const std::vector<std::int32_t> from{0, 1};
  const std::vector<std::int32_t> to{3, 2};

  std::vector<float> largest(4);
  std::vector<float> expected_largest(4);

  std::vector<std::uint8_t> sketch(4 * 64 * 18);
  std::vector<std::uint8_t> expected_sketch(sketch.size());
  const CacheSpan span{
      expected_data.data(),   4, 64, 0, expected_sums.data(), 64, 0, expected_largest.data(), 0,
      expected_sketch.data(), 2};
  append(span, {k.data(), DType::f32, kTokens, 64, 0}, slots, ScaleFormat::ue8m0);
  copy_pages({span.data, 4, 64, 0, span.page_sums, 64, 0, span.largest_scales, 0, span.sketch, 2},
             from, span, to);

  const misa_cache_span cache{data.data(),   4, 64, 0, sums.data(), 0, 0, largest.data(), 0,
                              sketch.data(), 2, 0};
  const misa_cache_view view{data.data(),   4, 64, 0, sums.data(), 0, 0, largest.data(), 0,
                             sketch.data(), 2, 0};
  const misa_new_keys keys{k.data(), MISA_F32, kTokens, 64, 0};
  ASSERT_EQ(misa_cache_append(&cache, &keys, slots.data(), slots.size(), MISA_SCALE_UE8M0),
            MISA_OK);
  ASSERT_EQ(misa_cache_copy_pages(&view, from.data(), &cache, to.data(), 2), MISA_OK);
  EXPECT_EQ(data, expected_data);
  EXPECT_EQ(sums, expected_sums);
  EXPECT_EQ(largest, expected_largest);
  EXPECT_EQ(sketch, expected_sketch);

  misa_page_tail tail{};
  ASSERT_EQ(misa_cache_page_tail(128, 0, 2, &tail), MISA_OK);
  EXPECT_EQ(tail.page_sums, page_tail(128).page_sums);
  EXPECT_EQ(tail.largest_scales, page_tail(128).largest_scales);
  EXPECT_EQ(tail.sketch, page_tail(128).sketch);
  EXPECT_EQ(tail.page_stride, page_tail(128, 64, 2).page_stride);
  ASSERT_EQ(misa_cache_bytes(4, 64, 128, &bytes), MISA_OK);
  EXPECT_EQ(bytes, cache_bytes(4, 64, 128));

  sums.assign(sums.size(), 0);
  const std::vector<std::int32_t> pages{0, 1, 2, 3};
  const std::vector<std::int32_t> filled{64, 6, 6, 64};
  ASSERT_EQ(misa_cache_rebuild(&cache, pages.data(), filled.data(), 4), MISA_OK);
  EXPECT_EQ(sums, expected_sums);
  sums.assign(sums.size(), 0);
  ASSERT_EQ(misa_cache_rebuild(&cache, pages.data(), nullptr, 1), MISA_OK);
  EXPECT_TRUE(std::equal(sums.begin(), sums.begin() + 64, expected_sums.begin()));

  std::vector<std::uint8_t> gathered(kTokens * 64);
  std::vector<float> scale(kTokens);
  ASSERT_EQ(misa_cache_gather(&view, to.data(), 2, kTokens, gathered.data(), scale.data()),
            MISA_OK);
  std::vector<std::uint8_t> one(64);
  float one_scale = 0;
  ASSERT_EQ(misa_cache_quantize(k.data() + 69 * 64, 64, MISA_SCALE_UE8M0, one.data(), &one_scale),
            MISA_OK);
  EXPECT_EQ(scale[69], one_scale);
  EXPECT_TRUE(std::equal(one.begin(), one.end(), gathered.begin() + 69 * 64));
}

TEST(CApi, ListsTheBackends) {
  const std::vector<BackendInfo> expected = backends();
  std::size_t count = 0;
  ASSERT_EQ(misa_backend_count(&count), MISA_OK);
  ASSERT_EQ(count, expected.size());
  for (std::size_t i = 0; i < count; ++i) {
    misa_backend_info info{};
    ASSERT_EQ(misa_backend_at(i, &info), MISA_OK);
    EXPECT_EQ(info.name, expected[i].name);
    EXPECT_EQ(info.isa, expected[i].isa);
    EXPECT_EQ(info.requirement, expected[i].requirement);
    EXPECT_EQ(info.available != 0, expected[i].available);
    EXPECT_EQ(info.priority, expected[i].priority);
  }
  misa_backend_info info{};
  EXPECT_EQ(misa_backend_at(count, &info), MISA_INVALID_ARGUMENT);
  EXPECT_THAT(misa_last_error(), StartsWith("index: expected 0 to "));
  EXPECT_EQ(misa_version(), std::string(version()));
}

TEST(CApi, ConfigsAreThoseOfTheNamedIndexers) {
  for (const std::string_view name : indexer_names()) {
    const IndexerConfig expected = indexer_by_name(name);
    misa_config config{};
    ASSERT_EQ(misa_config_by_name(std::string(name).c_str(), &config), MISA_OK);
    EXPECT_EQ(config.top_k, expected.top_k);
    EXPECT_EQ(config.router, static_cast<std::int32_t>(expected.router));
    EXPECT_EQ(config.heads, expected.heads);
    EXPECT_EQ(config.block, expected.block);
    EXPECT_EQ(config.residual != 0, expected.residual);
    EXPECT_EQ(config.filter_block, expected.filter_block);
    EXPECT_EQ(config.filter_blocks, expected.filter_blocks);
    EXPECT_EQ(config.candidates, expected.candidates);
    EXPECT_EQ(config.ordered != 0, expected.ordered);
    EXPECT_EQ(config.static_head_count, 0U);
    EXPECT_EQ(config.dense_work, expected.dense_work);
    EXPECT_EQ(config.sketch, expected.sketch);
  }
}

// A plan with a sketch needs other memory than one without.
TEST(CApi, APlanHasTheSketchOfItsConfig) {
  const misa_context_options options{"cpu", 1, 0};
  const Context context({.backend = "cpu", .threads = 1});
  const misa_shape c_shape{8, 8, 64, 150, MISA_BF16, MISA_E4M3};
  const Shape shape{8, 8, 64, 150, DType::bf16, DType::e4m3};
  std::vector<std::size_t> sizes;
  for (const int sketch : {0, 2, 4, 3}) {
    Handles handles;
    ASSERT_EQ(misa_context_create(&options, &handles.context), MISA_OK);
    misa_config c = c_config();
    c.sketch = sketch;
    IndexerConfig config = kConfig;
    config.sketch = sketch;
    if (sketch == 3) {
      EXPECT_EQ(misa_plan_create(handles.context, &c, &c_shape, &handles.plan),
                MISA_INVALID_ARGUMENT);
      EXPECT_STREQ(misa_last_error(), "sketch: expected 0 (none), 2 or 4, got 3");
      continue;
    }
    ASSERT_EQ(misa_plan_create(handles.context, &c, &c_shape, &handles.plan), MISA_OK);
    std::size_t bytes = 0;
    ASSERT_EQ(misa_plan_workspace_bytes(handles.plan, &bytes), MISA_OK);
    EXPECT_EQ(bytes, Plan(context, config, shape).workspace_bytes());
    sizes.push_back(bytes);
  }
  EXPECT_LT(sizes[0], sizes[1]);
  EXPECT_EQ(sizes[1], sizes[2]);
}

// The status of a failed call; checks its message.
void expect_invalid(misa_status status, const std::string& message) {
  EXPECT_EQ(status, MISA_INVALID_ARGUMENT);
  EXPECT_THAT(misa_last_error(), HasSubstr(message));
}

TEST(CApi, NullPointersAreErrorsSmoke) {
  Handles handles;
  std::size_t bytes = 0;
  create(handles, bytes);
  const misa_config config = c_config();
  const misa_shape shape{8, 8, 64, 150, MISA_BF16, MISA_E4M3};
  const misa_queries q{};
  const misa_weights w{};
  const misa_ragged_keys ragged{};
  const misa_paged_keys paged{};
  const misa_selection out{};
  misa_context* const no_context = nullptr;
  misa_plan* plan = nullptr;

  expect_invalid(misa_backend_count(nullptr), "count: expected a pointer, got null");
  expect_invalid(misa_backend_at(0, nullptr), "info: ");
  expect_invalid(misa_context_create(nullptr, nullptr), "context: ");
  expect_invalid(misa_config_by_name(nullptr, nullptr), "indexer: ");
  expect_invalid(misa_config_by_name("dsa", nullptr), "config: ");
  expect_invalid(misa_plan_create(no_context, &config, &shape, &plan), "context: ");
  expect_invalid(misa_plan_create(handles.context, nullptr, &shape, &plan), "config: ");
  expect_invalid(misa_plan_create(handles.context, &config, nullptr, &plan), "shape: ");
  expect_invalid(misa_plan_create(handles.context, &config, &shape, nullptr), "plan: ");
  EXPECT_EQ(plan, nullptr);
  expect_invalid(misa_plan_workspace_bytes(nullptr, &bytes), "plan: ");
  expect_invalid(misa_plan_workspace_bytes(handles.plan, nullptr), "bytes: ");
  expect_invalid(misa_run_ragged(nullptr, &q, &w, &ragged, &out, nullptr, 0), "plan: ");
  expect_invalid(misa_run_ragged(handles.plan, nullptr, &w, &ragged, &out, nullptr, 0), "q: ");
  expect_invalid(misa_run_ragged(handles.plan, &q, nullptr, &ragged, &out, nullptr, 0), "w: ");
  expect_invalid(misa_run_ragged(handles.plan, &q, &w, nullptr, &out, nullptr, 0), "k: ");
  expect_invalid(misa_run_ragged(handles.plan, &q, &w, &ragged, nullptr, nullptr, 0), "out: ");
  expect_invalid(misa_run_paged(handles.plan, &q, &w, nullptr, &out, nullptr, 0), "k: ");
  expect_invalid(misa_run_paged(handles.plan, &q, &w, &paged, &out, nullptr, 8), "workspace: ");

  const misa_ragged_means means{};
  misa_ragged_means no_starts{};
  no_starts.start_count = 1;
  const auto route = [&](const misa_context* context, const misa_queries* queries,
                         const misa_weights* weights, const misa_ragged_means* rows) {
    return misa_route_from_means(context, queries, weights, rows, 1, nullptr, 0);
  };
  expect_invalid(route(nullptr, &q, &w, &means), "context: ");
  expect_invalid(route(handles.context, nullptr, &w, &means), "q: ");
  expect_invalid(route(handles.context, &q, nullptr, &means), "w: ");
  expect_invalid(route(handles.context, &q, &w, nullptr), "means: ");
  expect_invalid(route(handles.context, &q, &w, &no_starts), "starts: ");
  expect_invalid(misa_keep_blocks_from_means(handles.context, &q, &w, &means, 2, nullptr, 1),
                 "out: ");

  const misa_cache_span cache{};
  const misa_cache_view view{};
  const misa_new_keys keys{};
  float scale = 0;
  expect_invalid(misa_cache_bytes(1, 64, 64, nullptr), "bytes: ");
  expect_invalid(misa_cache_page_tail(64, 64, 0, nullptr), "tail: ");
  std::uint8_t out_bytes[64] = {};
  expect_invalid(misa_cache_quantize(nullptr, 64, 0, out_bytes, &scale), "key: ");
  expect_invalid(misa_cache_quantize(nullptr, 0, 0, nullptr, nullptr), "scale: ");
  expect_invalid(misa_cache_append(nullptr, &keys, nullptr, 0, 0), "cache: ");
  expect_invalid(misa_cache_append(&cache, nullptr, nullptr, 0, 0), "keys: ");
  expect_invalid(misa_cache_append(&cache, &keys, nullptr, 1, 0), "slots: ");
  expect_invalid(misa_cache_copy_pages(nullptr, nullptr, &cache, nullptr, 0), "source: ");
  expect_invalid(misa_cache_copy_pages(&view, nullptr, nullptr, nullptr, 0), "target: ");
  expect_invalid(misa_cache_copy_pages(&view, nullptr, &cache, nullptr, 1), "expected 1 elements");
  expect_invalid(misa_cache_rebuild(nullptr, nullptr, nullptr, 0), "cache: ");
  expect_invalid(misa_cache_gather(nullptr, nullptr, 0, 0, nullptr, nullptr), "cache: ");
  misa_context_destroy(nullptr);
  misa_plan_destroy(nullptr);

  const misa_cuda_plan_options options{};
  misa_cuda_plan* device_plan = nullptr;
  expect_invalid(misa_cuda_plan_create(nullptr, &shape, &options, &device_plan), "config: ");
  expect_invalid(misa_cuda_plan_create(&config, nullptr, &options, &device_plan), "shape: ");
  expect_invalid(misa_cuda_plan_create(&config, &shape, nullptr, &device_plan), "options: ");
  expect_invalid(misa_cuda_plan_create(&config, &shape, &options, nullptr), "plan: ");
  EXPECT_EQ(device_plan, nullptr);
  expect_invalid(misa_cuda_plan_workspace_bytes(nullptr, &bytes), "plan: ");
  expect_invalid(misa_cuda_run_ragged(nullptr, &q, &w, &ragged, &out, nullptr, 0, nullptr),
                 "plan: ");
  expect_invalid(misa_cuda_run_paged(nullptr, &q, &w, &paged, &out, nullptr, 0, nullptr), "plan: ");
  expect_invalid(misa_cuda_top_k(nullptr, 1, nullptr, nullptr), "logits: ");
  expect_invalid(misa_cuda_cache_append(nullptr, &keys, nullptr, 0, 0, nullptr), "cache: ");
  expect_invalid(misa_cuda_cache_append(&cache, &keys, nullptr, 1, 0, nullptr), "slots: ");
  expect_invalid(misa_cuda_cache_copy_pages(nullptr, nullptr, &cache, nullptr, 0, nullptr),
                 "source: ");
  expect_invalid(misa_cuda_cache_rebuild(nullptr, nullptr, nullptr, 0, nullptr), "cache: ");
  misa_cuda_plan_destroy(nullptr);
}

// Without a device, and in a library without CUDA, a plan for device memory is refused.
TEST(CApi, DevicePlansNeedADevice) {
  for (const BackendInfo& backend : backends()) {
    if (backend.name.starts_with("cuda") && backend.available) {
      GTEST_SKIP() << "tests/gpu has the tests with a device";
    }
  }
  const misa_config config = c_config();
  const misa_shape shape{8, 8, 64, 150, MISA_BF16, MISA_E4M3};
  const misa_cuda_plan_options options{};
  misa_cuda_plan* plan = nullptr;
  EXPECT_EQ(misa_cuda_plan_create(&config, &shape, &options, &plan), MISA_UNSUPPORTED);
  EXPECT_THAT(misa_last_error(), HasSubstr(": expected "));
  EXPECT_EQ(plan, nullptr);
}

TEST(CApi, ErrorsKeepTheirCode) {
  misa_context* context = nullptr;
  const misa_context_options unknown{"tpu", 0, 0};
  EXPECT_EQ(misa_context_create(&unknown, &context), MISA_UNSUPPORTED);
  EXPECT_THAT(misa_last_error(), HasSubstr("got 'tpu'"));
  const misa_context_options threads{nullptr, -1, 0};
  expect_invalid(misa_context_create(&threads, &context), "threads: ");
  EXPECT_EQ(context, nullptr);

  Handles handles;
  std::size_t bytes = 0;
  create(handles, bytes);
  misa_config config = c_config();
  misa_shape shape{8, 8, 64, 150, MISA_BF16, MISA_E4M3};
  for (const std::int32_t outside : {-1, 3, 256}) {
    shape.k_dtype = outside;
    expect_invalid(misa_plan_create(handles.context, &config, &shape, &handles.plan), "k_dtype: ");
  }
  shape.k_dtype = MISA_E4M3;
  for (const std::int32_t outside : {-1, 8, 256}) {
    config.router = outside;
    expect_invalid(misa_plan_create(handles.context, &config, &shape, &handles.plan), "router: ");
  }
  config = c_config();
  config.static_head_count = 2;
  expect_invalid(misa_plan_create(handles.context, &config, &shape, &handles.plan),
                 "static_heads: expected 2 elements, got null");
  config = c_config();
  config.dense_work = -1;
  expect_invalid(misa_plan_create(handles.context, &config, &shape, &handles.plan), "dense_work: ");
  float scale = 0;
  const std::vector<float> key(64);
  std::vector<std::uint8_t> out(64);
  expect_invalid(misa_cache_quantize(key.data(), 64, 2, out.data(), &scale), "scale format: ");
}

TEST(CApi, MessagesBelongToTheirThread) {
  misa_config config{};
  EXPECT_EQ(misa_config_by_name("first", &config), MISA_INVALID_ARGUMENT);
  std::string at_start = "none";
  std::string after;
  std::thread other([&] {
    at_start = misa_last_error();
    misa_config_by_name("second", &config);
    after = misa_last_error();
  });
  other.join();
  EXPECT_EQ(at_start, "");
  EXPECT_THAT(after, HasSubstr("'second'"));
  EXPECT_THAT(misa_last_error(), HasSubstr("'first'"));
}

TEST(CApi, LongMessagesAreCut) {
  misa_config config{};
  const std::string name(10000, 'x');
  EXPECT_EQ(misa_config_by_name(name.c_str(), &config), MISA_INVALID_ARGUMENT);
  EXPECT_EQ(std::strlen(misa_last_error()), 511U);
  EXPECT_THAT(misa_last_error(), StartsWith("indexer: expected dsa"));
}

}  // namespace
}  // namespace misa
