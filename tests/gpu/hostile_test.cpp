// SPDX-License-Identifier: Apache-2.0
// What no host sees before a paged call runs on the device: whatever its lengths, tables, starts
// and outputs hold, the call ends, stays inside its arrays and leaves rows whose inputs are right
// as they are. paged_test.cpp has the values of rows that are cut off, and keys without a page.
#include <cuda_runtime_api.h>

#include <algorithm>
#include <array>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <vector>

#include "common.hpp"
#include "core/sketch.hpp"
#include "misa/cache.hpp"
#include "misa/cuda.hpp"

namespace misa::test {
namespace {

constexpr int kTopK = 48;
constexpr std::int32_t kLeast = std::numeric_limits<std::int32_t>::min();
constexpr std::int32_t kMost = std::numeric_limits<std::int32_t>::max();

template <class T>
std::vector<T> copy_of(const T* data, std::int64_t count) {
  return data == nullptr ? std::vector<T>{} : std::vector<T>(data, data + count);
}

// A paged call in host memory, of which every array may be changed. Page sums, if there are any,
// stand in the pages; sketches are made on the device, of configs that read them.
struct Arrays {
  std::vector<std::byte> q;
  std::vector<float> w;
  std::vector<std::uint8_t> cache;
  std::vector<std::int32_t> block_table;
  std::vector<std::int32_t> context_lens;
  std::vector<std::int32_t> query_starts;
  std::vector<std::int32_t> row_lens;
  Queries queries;
  Weights weights;
  PagedKeys keys;

  explicit Arrays(const PagedInputs& inputs)
      : queries(inputs.q(inputs.all())),
        weights(inputs.w(inputs.all())),
        keys(inputs.k(inputs.all())) {
    q = copy_of(
        static_cast<const std::byte*>(queries.data),
        queries.tokens * queries.token_stride * static_cast<std::int64_t>(size_of(queries.dtype)));
    w = copy_of(weights.data, weights.tokens * weights.token_stride);
    cache = copy_of(keys.cache.data, keys.cache.pages * keys.cache.page_stride);
    block_table = copy_of(keys.block_table, sequences() * keys.block_table_stride);
    context_lens.assign(keys.context_lens.begin(), keys.context_lens.end());
    query_starts.assign(keys.query_starts.begin(), keys.query_starts.end());
    row_lens.assign(keys.row_lens.begin(), keys.row_lens.end());
  }

  [[nodiscard]] std::int64_t sequences() const {
    return !keys.query_starts.empty()   ? std::ssize(keys.query_starts) - 1
           : !keys.context_lens.empty() ? std::ssize(keys.context_lens)
                                        : queries.tokens / keys.next_n;
  }
  [[nodiscard]] std::int64_t capacity() const { return keys.max_pages * keys.cache.page_size; }

  // Fills the bytes and scales of every key from position `first` of a sequence on.
  void poison(std::int64_t sequence, std::int64_t first, int byte) {
    const std::int64_t size = keys.cache.page_size;
    for (std::int64_t p = first; p < capacity(); ++p) {
      std::uint8_t* const page =
          cache.data() +
          block_table[sequence * keys.block_table_stride + p / size] * keys.cache.page_stride;
      std::memset(page + p % size * keys.cache.dim, byte, static_cast<std::size_t>(keys.cache.dim));
      std::memset(page + size * keys.cache.dim + p % size * 4, byte, 4);
    }
  }
};

// The arrays on the device, and room for what is selected.
class Call {
 public:
  Call(const Arrays& arrays, const IndexerConfig& config)
      : top_k_(config.top_k),
        queries_(arrays.queries),
        weights_(arrays.weights),
        keys_(arrays.keys),
        q_(arrays.q),
        w_(arrays.w),
        cache_(arrays.cache),
        block_table_(arrays.block_table),
        context_lens_(arrays.context_lens),
        query_starts_(arrays.query_starts),
        row_lens_(arrays.row_lens),
        indices_(rows() * static_cast<std::size_t>(config.top_k)),
        scores_(indices_.span().size()),
        heads_(config.router == Router::all ? 0 : rows() * static_cast<std::size_t>(config.heads)),
        residual_(config.residual ? rows() * static_cast<std::size_t>(queries_.dim) : 0),
        sketch_(sketch_bytes(keys_.cache, config.sketch)) {
    queries_.data = q_.data();
    weights_.data = w_.data();
    keys_.cache.data = cache_.data();
    keys_.cache.sketch_bits = config.sketch;
    derive(keys_.cache.page_sums != nullptr);
    keys_.block_table = block_table_.data();
    keys_.context_lens = context_lens_.span();
    keys_.query_starts = query_starts_.span();
    keys_.row_lens = row_lens_.span();
  }

  [[nodiscard]] PagedKeys& keys() { return keys_; }
  [[nodiscard]] Selection outputs() const {
    return {indices_.span(), scores_.span(), heads_.span(), residual_.span()};
  }

  void run(const cuda::Plan& plan, const Selection& out, int workspace_byte = 0xFF) const {
    const Guarded<std::byte> workspace(plan.workspace_bytes());
    expect_success(cudaMemset(workspace.data(), workspace_byte, workspace.span().size()));
    expect_success(cudaDeviceSynchronize());
    plan.run(queries_, weights_, keys_, out, workspace.span(), nullptr);
    if (!ends(nullptr)) {
      std::fprintf(stderr, "the device hangs\n");
      std::_Exit(1);  // whatever comes next would wait for it
    }
    workspace.expect_red_zones();
  }

  [[nodiscard]] Selected run(const cuda::Plan& plan, int workspace_byte = 0xFF) const {
    run(plan, outputs(), workspace_byte);
    return result();
  }

  // Checks that nothing beside the arrays was written, too.
  [[nodiscard]] Selected result() const {
    for (const auto* array : {&block_table_, &context_lens_, &query_starts_, &row_lens_}) {
      array->expect_red_zones();
    }
    cache_.expect_red_zones();
    sketch_.expect_red_zones();
    return {queries_.tokens, top_k_,        indices_.read(),
            scores_.read(),  heads_.read(), residual_.read()};
  }

 private:
  [[nodiscard]] std::size_t rows() const { return static_cast<std::size_t>(queries_.tokens); }

  static std::size_t sketch_bytes(const CacheView& cache, int sketch) {
    return sketch == 0 ? 0
                       : static_cast<std::size_t>(
                             cache.pages * sketch_page_bytes(sketch, cache.dim, cache.page_size));
  }

  // What devices derive from the bytes of all pages: sums and largest scales, in the pages, and the
  // sketches that the config reads.
  void derive(bool sums) {
    CacheView& view = keys_.cache;
    CacheSpan span{cache_.data(), view.pages, view.dim, view.page_stride};
    span.page_size = view.page_size;
    view.page_sums = nullptr;
    if (sums) {
      span = with_tail(span);
      view.page_sums = span.page_sums;
      view.page_sums_stride = span.page_sums_stride;
      view.largest_scales = span.largest_scales;
      view.largest_scales_stride = span.largest_scales_stride;
    }
    if (view.sketch_bits != 0) {
      view.sketch = span.sketch = sketch_.data();
      span.sketch_bits = view.sketch_bits;
    }
    if (sums || view.sketch_bits != 0) {
      std::vector<std::int32_t> pages(static_cast<std::size_t>(view.pages));
      std::iota(pages.begin(), pages.end(), 0);
      const Guarded<std::int32_t> all{std::span<const std::int32_t>(pages)};
      cuda::rebuild(span, all.span(), {}, nullptr);
      expect_success(cudaDeviceSynchronize());
    }
  }

  std::int64_t top_k_;
  Queries queries_;
  Weights weights_;
  PagedKeys keys_;
  Guarded<std::byte> q_;
  Guarded<float> w_;
  Guarded<std::uint8_t> cache_;
  Guarded<std::int32_t> block_table_;
  Guarded<std::int32_t> context_lens_;
  Guarded<std::int32_t> query_starts_;
  Guarded<std::int32_t> row_lens_;
  Guarded<std::int32_t> indices_;
  Guarded<float> scores_;
  Guarded<std::int32_t> heads_;
  Guarded<float> residual_;
  Guarded<std::uint8_t> sketch_;
};

std::vector<NamedConfig> configs() {
  std::vector<NamedConfig> all = named_configs(kTopK, 2);
  IndexerConfig everything = IndexerConfig::misa_r(kTopK, 2, 100);
  everything.filter_block = 128;
  everything.filter_blocks = 3;
  all.push_back({"hisa x misa-r re-ranked", everything});
  IndexerConfig pooled = IndexerConfig::misa(kTopK, 2);
  pooled.block = 192;
  pooled.residual = true;
  all.push_back({"pooled with a residual row", pooled});
  IndexerConfig self = IndexerConfig::misa(kTopK, 2);
  self.router = Router::self;
  all.push_back({"self", self});
  for (const int sketch : {2, 4}) {
    IndexerConfig routed = IndexerConfig::misa_r(kTopK, 2, 100);
    routed.sketch = sketch;
    all.push_back({"misa-r, " + std::to_string(sketch) + "-bit", routed});
    IndexerConfig every_head = IndexerConfig::dsa(kTopK);
    every_head.candidates = 72;
    every_head.sketch = sketch;
    all.push_back({"every head, " + std::to_string(sketch) + "-bit", every_head});
  }
  return all;
}

Pack pack_of(const std::vector<SequenceSpec>& sequences, std::int64_t dim = 128) {
  PackSpec spec;
  spec.sequences = sequences;
  spec.heads = 6;
  spec.dim = dim;
  spec.q_dtype = DType::e4m3;
  spec.k_dtype = DType::e4m3;
  return make_pack(spec);
}

// Positions ascend inside [0, limit), then only padding follows.
::testing::AssertionResult well_formed(const Selected& result, std::int64_t limit) {
  for (std::int64_t i = 0; i < std::ssize(result.indices); ++i) {
    const bool first = i % result.top_k == 0;
    const std::int64_t before = first ? -1 : result.indices[i - 1];
    const std::int64_t position = result.indices[i];
    const bool padding =
        position == -1 && result.scores[i] == -std::numeric_limits<float>::infinity();
    const bool follows = position > before && position < limit && (first || before >= 0);
    if (!padding && !follows) {
      return ::testing::AssertionFailure()
             << "row " << i / result.top_k << ", entry " << i % result.top_k << ": " << position
             << " after " << before << ", score " << result.scores[i];
    }
  }
  return ::testing::AssertionSuccess();
}

// A value that no length, page or start has, or one that it may have.
std::int32_t anything(std::mt19937& random, std::int64_t right) {
  const auto near = static_cast<std::int32_t>(random() % static_cast<std::uint64_t>(right + 3)) - 1;
  const std::array<std::int32_t, 10> values{
      kLeast, kLeast + 1, -1,    0,         near,
      near,   1 << 20,    kMost, kMost - 1, static_cast<std::int32_t>(random())};
  return values[random() % values.size()];
}

class HostilePagedCall : public EachCudaBackend {
 protected:
  // More than the call's own, in the shape of the plan.
  struct Slack {
    std::int64_t tokens = 0;
    std::int64_t batch = 0;
    std::int64_t keys = 0;
  };

  [[nodiscard]] cuda::Plan plan(const IndexerConfig& config, const Arrays& arrays,
                                const Slack& slack) const {
    cuda::PlanOptions options;
    options.batch = arrays.sequences() + slack.batch;
    options.backend = GetParam();
    const Queries& q = arrays.queries;
    return cuda::Plan(config,
                      {q.tokens + slack.tokens, q.heads, q.dim, arrays.capacity() + slack.keys,
                       q.dtype, DType::e4m3},
                      options);
  }
  [[nodiscard]] cuda::Plan plan(const IndexerConfig& config, const Arrays& arrays) const {
    return plan(config, arrays, {});
  }

  // Right arrays of which most entries are replaced.
  void expect_rows_of_anything(unsigned first_seed, unsigned end_seed) const {
    const Pack pack = pack_of({{700, 3}, {0, 1}, {130, 0}, {300, 9}, {1, 2}});
    for (const Lengths lengths : {Lengths::query_starts, Lengths::starts_and_rows}) {
      const Arrays right{PagedInputs(pack, {5, 0, false, 64, true, lengths})};
      for (const NamedConfig& named : configs()) {
        const cuda::Plan plan = this->plan(named.config, right);
        for (unsigned seed = first_seed; seed < end_seed; ++seed) {
          std::mt19937 random(seed);
          Arrays arrays = right;
          const auto spoil = [&](std::vector<std::int32_t>& values, std::int64_t bound) {
            for (std::int32_t& value : values) {
              value = random() % 3 == 0 ? value : anything(random, bound);
            }
          };
          spoil(arrays.query_starts, arrays.queries.tokens);
          spoil(arrays.context_lens, arrays.capacity());
          spoil(arrays.row_lens, arrays.capacity());
          spoil(arrays.block_table, arrays.keys.cache.pages);
          EXPECT_TRUE(well_formed(Call(arrays, named.config).run(plan), arrays.capacity()))
              << named.name << ", seed " << seed;
        }
      }
    }
  }
};

// Sequences 0, 2, … are right, and select what they select alone.
TEST_P(HostilePagedCall, SmokeRightRowsAmongOthers) {
  const Pack pack =
      pack_of({{700, 2}, {650, 2}, {130, 2}, {64, 2}, {1, 2}, {500, 2}, {1100, 2}, {900, 2}});
  for (const Lengths lengths : {Lengths::next_n, Lengths::rows}) {
    PageLayout layout{7, 0, false, 64, true, lengths};
    const Arrays right{PagedInputs(pack, layout)};
    for (const NamedConfig& named : configs()) {
      const Selected wanted = run(context(), named.config, PagedInputs(pack, layout));
      const cuda::Plan plan = this->plan(named.config, right);
      for (unsigned seed = 0; seed < 4; ++seed) {
        std::mt19937 random(seed);
        Arrays arrays = right;
        for (std::int64_t b = 1; b < arrays.sequences(); b += 2) {
          for (std::int64_t i = 0; i < arrays.keys.block_table_stride; ++i) {
            arrays.block_table[b * arrays.keys.block_table_stride + i] =
                anything(random, arrays.keys.cache.pages);
          }
          if (lengths == Lengths::next_n) {
            arrays.context_lens[b] = anything(random, arrays.capacity());
          } else {
            arrays.row_lens[2 * b] = anything(random, arrays.capacity());
            arrays.row_lens[2 * b + 1] = anything(random, arrays.capacity());
          }
          const std::int64_t width = std::ssize(arrays.q) / arrays.queries.tokens;
          std::memset(arrays.q.data() + 2 * b * width, 0x7F, static_cast<std::size_t>(width));
          arrays.w[2 * b * arrays.weights.token_stride] = std::numeric_limits<float>::infinity();
        }
        const Selected result = Call(arrays, named.config).run(plan);
        EXPECT_TRUE(well_formed(result, arrays.capacity())) << named.name << ", seed " << seed;
        for (std::int64_t b = 0; b < arrays.sequences(); b += 2) {
          EXPECT_TRUE(same_bits(slice(result, {2 * b, 2}), slice(wanted, {2 * b, 2})))
              << named.name << ", sequence " << b << ", seed " << seed;
        }
      }
    }
  }
}

// Lengths by row are cut off at the block table and at the planned length.
TEST_P(HostilePagedCall, SmokeLengthsByRowAreCutOff) {
  const Pack pack = pack_of({{640, 4}, {640, 4}});
  const PagedInputs inputs(pack, {3, 0, false, 64, false, Lengths::rows});
  Arrays arrays(inputs);
  arrays.row_lens = {kMost, 641, 640, kLeast, -1, kMost - 1, 0, 1 << 30};
  for (const std::int64_t longest : {640, 500}) {
    std::vector<std::int32_t> cut_off;
    for (const std::int32_t length : arrays.row_lens) {
      cut_off.push_back(std::clamp(length, 0, static_cast<std::int32_t>(longest)));
    }
    PagedKeys keys = inputs.k(inputs.all());
    keys.row_lens = cut_off;
    for (const NamedConfig& named : configs()) {
      const Selected wanted = select(context(), named.config, inputs.q(inputs.all()),
                                     inputs.w(inputs.all()), keys, {true, true, true});
      EXPECT_TRUE(same_bits(
          Call(arrays, named.config).run(plan(named.config, arrays, {0, 0, longest - 640})),
          wanted))
          << named.name << ", at " << longest;
    }
  }
}

TEST_P(HostilePagedCall, SmokeAnythingInEveryArray) { expect_rows_of_anything(0, 2); }

TEST_P(HostilePagedCall, MoreOfAnything) { expect_rows_of_anything(2, 20); }

// Neither keys beyond the lengths nor the sums of their groups are used.
TEST_P(HostilePagedCall, SmokeKeysBeyondTheLengths) {
  const Pack pack = pack_of({{700, 2}, {1100, 2}, {640, 2}, {640, 2}});
  const std::vector<std::int32_t> lens{321, 1024, 64, 2};
  for (const std::int64_t page_size : {64, 128}) {
    const PagedInputs inputs(pack, {3, 0, true, page_size, true});
    PagedKeys keys = inputs.k(inputs.all());
    keys.context_lens = lens;
    Arrays arrays(inputs);
    arrays.context_lens = lens;
    for (const int byte : {0xFF, 0x7F, 0x00}) {
      for (std::int64_t b = 0; b < arrays.sequences(); ++b) {
        // Only the pages that the sequence has.
        Arrays own = arrays;
        own.keys.max_pages = (pack.spec.sequences[b].keys + page_size - 1) / page_size;
        own.poison(b, lens[b], byte);
        arrays.cache = own.cache;
      }
      for (const NamedConfig& named : configs()) {
        const Selected wanted = select(context(), named.config, inputs.q(inputs.all()),
                                       inputs.w(inputs.all()), keys, {true, true, true});
        EXPECT_TRUE(same_bits(Call(arrays, named.config).run(plan(named.config, arrays)), wanted))
            << named.name << ", pages of " << page_size << ", byte " << byte;
      }
    }
  }
}

// What a workspace holds before, and how much larger than the call a plan is, change nothing.
TEST_P(HostilePagedCall, SmokeWorkspaceAndPlan) {
  const Pack pack = pack_of({{700, 3}, {40, 3}, {1100, 3}});
  const PagedInputs inputs(pack, {3, 16});  // padded strides of everything
  const Arrays arrays(inputs);
  for (const NamedConfig& named : configs()) {
    const Selected wanted = run(context(), named.config, inputs);
    const Call call(arrays, named.config);
    for (const int byte : {0x00, 0x7F, 0xFF}) {
      EXPECT_TRUE(same_bits(call.run(plan(named.config, arrays), byte), wanted))
          << named.name << ", bytes of " << byte;
    }
    EXPECT_TRUE(same_bits(call.run(plan(named.config, arrays, {55, 20, 60000})), wanted))
        << named.name << ", a larger plan";
  }
}

// Every output may be left out, and the others are as they were.
TEST_P(HostilePagedCall, OutputsLeftOut) {
  const Pack pack = pack_of({{700, 3}, {40, 3}, {1100, 3}});
  const Arrays arrays{PagedInputs(pack, {3})};
  for (const NamedConfig& named : configs()) {
    const cuda::Plan plan = this->plan(named.config, arrays);
    const Selected wanted = Call(arrays, named.config).run(plan);
    for (unsigned kept = 0; kept < 16; ++kept) {
      const Call call(arrays, named.config);
      Selection out = call.outputs();
      const Selected untouched = call.result();
      out.indices = (kept & 1U) != 0 ? out.indices : std::span<std::int32_t>{};
      out.scores = (kept & 2U) != 0 ? out.scores : std::span<float>{};
      out.heads = (kept & 4U) != 0 ? out.heads : std::span<std::int32_t>{};
      out.residual = (kept & 8U) != 0 ? out.residual : std::span<float>{};
      call.run(plan, out);
      Selected expected = untouched;
      expected.indices = (kept & 1U) != 0 ? wanted.indices : untouched.indices;
      expected.scores = (kept & 2U) != 0 ? wanted.scores : untouched.scores;
      expected.heads = (kept & 4U) != 0 ? wanted.heads : untouched.heads;
      expected.residual = (kept & 8U) != 0 ? wanted.residual : untouched.residual;
      EXPECT_TRUE(same_bits(call.result(), expected)) << named.name << ", " << kept;
    }
  }
}

// Outputs that overlap hold anything, but nothing else is written, nor read out of bounds: kernels
// read heads and positions again that others of the same call have written.
TEST_P(HostilePagedCall, SmokeOverlappingOutputs) {
  const Pack pack = pack_of({{700, 30}, {40, 30}, {1100, 30}});
  const Arrays arrays{PagedInputs(pack, {3})};
  std::vector<NamedConfig> all = configs();
  all.push_back({"hisa, many blocks", IndexerConfig::hisa(kTopK, 128, 200)});
  IndexerConfig linear = IndexerConfig::misa_r(kTopK, 2, 100);
  linear.filter_block = 128;
  linear.filter_blocks = 200;
  all.push_back({"hisa, many blocks, x misa-r re-ranked", linear});
  for (const NamedConfig& named : all) {
    const Call call(arrays, named.config);
    const Selection apart = call.outputs();
    std::size_t most = 0;
    for (const std::size_t size :
         {apart.indices.size(), apart.scores.size(), apart.heads.size(), apart.residual.size()}) {
      most = std::max(most, size);
    }
    for (const std::size_t shift : {std::size_t{0}, std::size_t{1}, std::size_t{kTopK / 2}}) {
      const Guarded<std::int32_t> memory(most + 3 * shift);
      Selection out = apart;
      const auto place = [&](auto& output, std::size_t first) {
        using T = std::remove_reference_t<decltype(output[0])>;
        output = {reinterpret_cast<T*>(memory.data() + first), output.size()};
      };
      place(out.indices, 0);
      place(out.scores, shift);
      place(out.heads, 2 * shift);
      place(out.residual, 3 * shift);
      call.run(plan(named.config, arrays), out);
      // A plan of long rows has other kernels.
      call.run(plan(named.config, arrays, {0, 0, 60000}), out);
      memory.expect_red_zones();
      (void)call.result();
    }
    EXPECT_TRUE(same_bits(call.run(plan(named.config, arrays)),
                          run(context(), named.config, PagedInputs(pack, {3}))))
        << named.name << ", afterwards";
  }
}

TEST_P(HostilePagedCall, SmokeCallsWithoutWork) {
  const Pack pack = pack_of({{700, 2}, {40, 2}});
  const Arrays arrays{PagedInputs(pack, {3})};
  const Pack nothing = pack_of({{700, 0}, {40, 0}});
  const Arrays no_queries{PagedInputs(nothing, {3, 0, false, 64, false, Lengths::query_starts})};
  for (const NamedConfig& named : configs()) {
    const cuda::Plan plan = this->plan(named.config, arrays);
    Call no_table(arrays, named.config);
    no_table.keys().max_pages = 0;
    no_table.keys().block_table_stride = 0;
    no_table.keys().block_table = nullptr;
    const Selected result = no_table.run(plan);
    EXPECT_TRUE(std::ranges::all_of(result.indices, [](std::int32_t i) { return i == -1; }))
        << named.name;
    EXPECT_TRUE(Call(no_queries, named.config).run(plan).indices.empty()) << named.name;
  }
}

INSTANTIATE_TEST_SUITE_P(Each, HostilePagedCall, ::testing::ValuesIn(cuda_backends_of_this_build()),
                         backend_name);

}  // namespace
}  // namespace misa::test
