// SPDX-License-Identifier: Apache-2.0
// The plan on a device that reads the keys of a paged cache in place: what it selects is, bit for
// bit, what the backend of the same name selects from the same keys in one array.
#include <cuda_runtime_api.h>
#include <gmock/gmock.h>

#include <algorithm>
#include <array>
#include <cstring>
#include <functional>
#include <limits>
#include <numeric>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "common.hpp"
#include "core/recipe.hpp"
#include "core/sketch.hpp"
#include "misa/cuda.hpp"
#include "misa/error.hpp"

namespace misa::test {
namespace {

using ::testing::HasSubstr;

constexpr int kTopK = 48;
constexpr std::int32_t kLeast = std::numeric_limits<std::int32_t>::min();
constexpr std::int32_t kMost = std::numeric_limits<std::int32_t>::max();

// Keys of a batch of sequences, and the queries that see them.
struct Batch {
  std::vector<std::int64_t> keys;     // per sequence, that have a place in the cache
  std::vector<std::int64_t> queries;  // per sequence
  std::vector<std::int32_t> context_lens;
  std::vector<std::int32_t> row_lens;  // or empty
  std::int64_t outside_before = 0;     // queries of no sequence
  std::int64_t outside_after = 0;
  std::int64_t next_n = 0;  // 0: query_starts say where the queries of a sequence are

  [[nodiscard]] std::int64_t sequences() const { return std::ssize(keys); }
};

// Every sequence has `next_n` queries.
Batch batch_of(std::vector<std::int32_t> context_lens, std::int64_t next_n) {
  Batch batch;
  batch.context_lens = std::move(context_lens);
  batch.next_n = next_n;
  for (const std::int32_t length : batch.context_lens) {
    batch.keys.push_back(std::max(length, 0));
    batch.queries.push_back(next_n);
  }
  return batch;
}

// Sequences with these numbers of queries.
Batch batch_of(std::vector<std::int32_t> context_lens, std::vector<std::int64_t> queries) {
  Batch batch = batch_of(std::move(context_lens), 0);
  batch.queries = std::move(queries);
  return batch;
}

struct Layout {
  std::int64_t page_size = 64;
  std::int64_t padding = 0;      // of a page, in units of 16 bytes
  std::int64_t extra_pages = 3;  // of the block table, beyond the longest sequence
  std::uint64_t seed = 1;        // of the order of pages
  bool tail = false;             // of a page, with room for sums
  int sketch = 0;                // bits of the sketches beside the cache, or 0
};

// Where the cache keeps the sums of its groups.
enum class Sums { none, arrays, arrays_without_scales, tail };

struct Numbers {
  std::int64_t heads = 6;
  std::int64_t dim = 64;
  DType q_dtype = DType::e4m3;
  std::uint64_t seed = 1;
};

// A call in host memory: queries, ragged keys and the same keys in pages.
class Inputs {
 public:
  static PackSpec spec_of(const Batch& batch, const Numbers& numbers) {
    PackSpec spec;
    for (std::int64_t b = 0; b < batch.sequences(); ++b) {
      spec.sequences.push_back({batch.keys[b], batch.queries[b]});
    }
    // A pack has queries of its sequences only; the others are those of sequences without keys.
    spec.sequences.push_back({0, batch.outside_before + batch.outside_after});
    spec.heads = numbers.heads;
    spec.dim = numbers.dim;
    spec.q_dtype = numbers.q_dtype;
    spec.k_dtype = DType::e4m3;
    spec.seed = numbers.seed;
    return spec;
  }

  Inputs(const Batch& batch, const Layout& layout, const Numbers& numbers)
      : Inputs(batch, layout, numbers, make_pack(spec_of(batch, numbers))) {}

  // With a pack of spec_of(batch, numbers), which takes seconds to make if it is large.
  Inputs(const Batch& batch, const Layout& layout, const Numbers& numbers, Pack pack)
      : batch_(batch),
        layout_(layout),
        numbers_(numbers),
        pack_(std::move(pack)),
        tensors_(pack_, 0) {
    for (std::int64_t b = 0; b < batch_.sequences(); ++b) {
      first_key_.push_back(std::ssize(scale_));
      k_.insert(k_.end(), pack_.k[b].begin(), pack_.k[b].end());
      scale_.insert(scale_.end(), pack_.scale[b].begin(), pack_.scale[b].end());
    }
    fill_pages();
    std::int64_t query = batch_.outside_before;
    query_starts_.push_back(static_cast<std::int32_t>(query));
    for (const std::int64_t queries : batch_.queries) {
      query += queries;
      query_starts_.push_back(static_cast<std::int32_t>(query));
    }
  }

  Inputs(const Inputs&) = delete;  // q() and w() are views of its members
  Inputs& operator=(const Inputs&) = delete;

  [[nodiscard]] const Batch& batch() const { return batch_; }
  [[nodiscard]] Queries q() const { return tensors_.q(tensors_.all()); }
  [[nodiscard]] Weights w() const { return tensors_.w(tensors_.all()); }
  [[nodiscard]] const std::vector<std::uint8_t>& cache() const { return cache_; }
  [[nodiscard]] const std::vector<std::uint8_t>& sketch() const { return sketch_; }
  [[nodiscard]] const std::vector<std::int32_t>& block_table() const { return block_table_; }
  [[nodiscard]] const std::vector<std::int32_t>& query_starts() const { return query_starts_; }
  [[nodiscard]] std::int64_t max_pages() const { return max_pages_; }
  [[nodiscard]] std::int64_t pages() const { return pages_; }
  [[nodiscard]] const Layout& layout() const { return layout_; }

  // The entry for page i of sequence b names no page; the keys in it are NaN.
  void spoil(std::int64_t b, std::int64_t i, std::int32_t entry) {
    block_table_[b * max_pages_ + i] = entry;
    const std::int64_t first = i * layout_.page_size;
    for (std::int64_t p = first; p < std::min(first + layout_.page_size, batch_.keys[b]); ++p) {
      scale_[first_key_[b] + p] = std::numeric_limits<float>::quiet_NaN();
    }
  }

  // The largest length of a row.
  [[nodiscard]] std::int64_t longest() const {
    std::int64_t longest = 0;
    for (std::int64_t b = 0; b < batch_.sequences(); ++b) {
      for (std::int64_t i = 0; i < batch_.queries[b]; ++i) {
        longest = std::max(longest, length(b, i));
      }
    }
    return longest;
  }

  [[nodiscard]] Shape shape() const {
    const Queries queries = q();
    return {queries.tokens, queries.heads, queries.dim, longest(), queries.dtype, DType::e4m3};
  }

  // What the context's backend selects from the keys in one array, if rows see `most` keys at most.
  [[nodiscard]] Selected expected(const Context& context, const IndexerConfig& config,
                                  std::int64_t most = kMost) const {
    std::vector<std::int32_t> starts(batch_.outside_before, 0);
    std::vector<std::int32_t> ends = starts;
    for (std::int64_t b = 0; b < batch_.sequences(); ++b) {
      for (std::int64_t i = 0; i < batch_.queries[b]; ++i) {
        starts.push_back(static_cast<std::int32_t>(first_key_[b]));
        ends.push_back(static_cast<std::int32_t>(first_key_[b] + std::min(length(b, i), most)));
      }
    }
    starts.resize(starts.size() + batch_.outside_after, 0);
    ends.resize(starts.size(), 0);
    const RaggedKeys keys{
        k_.data(), DType::e4m3, std::ssize(scale_), numbers_.dim, 0, scale_.data(), starts, ends};
    return select(context, config, q(), w(), keys, {true, true, true});
  }

 private:
  // How many keys query i of sequence b sees.
  [[nodiscard]] std::int64_t length(std::int64_t b, std::int64_t i) const {
    const std::int64_t query =
        std::accumulate(batch_.queries.begin(), batch_.queries.begin() + b, std::int64_t{0}) + i;
    const std::int64_t given =
        batch_.row_lens.empty() ? std::int64_t{batch_.context_lens[b]} - (batch_.queries[b] - 1 - i)
                                : std::int64_t{batch_.row_lens[batch_.outside_before + query]};
    return std::clamp<std::int64_t>(given, 0, batch_.keys[b]);
  }

  // All padding, and every page that no sequence has, is NaN. Entries of the table beyond a
  // sequence's pages are garbage.
  void fill_pages() {
    const std::int64_t size = layout_.page_size;
    const auto pages_of = [&](std::int64_t b) { return (batch_.keys[b] + size - 1) / size; };
    std::int64_t used = 0;
    for (std::int64_t b = 0; b < batch_.sequences(); ++b) {
      used += pages_of(b);
      max_pages_ = std::max(max_pages_, pages_of(b));
    }
    max_pages_ += layout_.extra_pages;
    pages_ = used + 2;
    const std::int64_t stride =
        layout_.tail ? page_tail(numbers_.dim, size).page_stride + layout_.padding * 128
                     : size * (numbers_.dim + 4) + layout_.padding * 16;
    cache_.assign(pages_ * stride, 0xFF);
    std::vector<std::int32_t> order(pages_);
    std::iota(order.begin(), order.end(), 0);
    std::mt19937_64 random(layout_.seed);
    std::shuffle(order.begin(), order.end(), random);
    const std::vector<std::int32_t> garbage{
        -1, static_cast<std::int32_t>(pages_), kLeast, kMost, 0, 1 << 20};
    std::int64_t next = 0;
    for (std::int64_t b = 0; b < batch_.sequences(); ++b) {
      for (std::int64_t i = 0; i < max_pages_; ++i) {
        block_table_.push_back(i < pages_of(b) ? order[next++]
                                               : garbage[random() % garbage.size()]);
      }
      for (std::int64_t p = 0; p < batch_.keys[b]; ++p) {
        std::uint8_t* const page = cache_.data() + block_table_[b * max_pages_ + p / size] * stride;
        std::memcpy(page + p % size * numbers_.dim, &pack_.k[b][p * numbers_.dim],
                    static_cast<std::size_t>(numbers_.dim));
        std::memcpy(page + size * numbers_.dim + p % size * 4, &pack_.scale[b][p], sizeof(float));
      }
    }
    if (layout_.sketch != 0) {
      CacheSpan span{cache_.data(), pages_, numbers_.dim, stride, nullptr, size};
      span.sketch_bits = layout_.sketch;
      span.sketch_stride = sketch_page_bytes(layout_.sketch, numbers_.dim, size) + 16;
      sketch_.assign(pages_ * span.sketch_stride, 0xFF);
      span.sketch = sketch_.data();
      rebuild(span, order);
    }
  }

  Batch batch_;
  Layout layout_;
  Numbers numbers_;
  Pack pack_;
  QueryTensors tensors_;
  std::vector<std::byte> k_;
  std::vector<float> scale_;
  std::vector<std::int64_t> first_key_;
  std::vector<std::uint8_t> cache_;
  std::vector<std::uint8_t> sketch_;
  std::vector<std::int32_t> block_table_;
  std::vector<std::int32_t> query_starts_;
  std::int64_t max_pages_ = 0;
  std::int64_t pages_ = 0;
};

std::span<const std::byte> bytes_of(const Queries& q) {
  return {static_cast<const std::byte*>(q.data),
          static_cast<std::size_t>(q.tokens * q.heads * q.dim) * size_of(q.dtype)};
}

// The call on the device, and room for what is selected.
class Call {
 public:
  Call(const Inputs& inputs, const IndexerConfig& config, Sums sums = Sums::none)
      : top_k_(config.top_k),
        queries_(inputs.q()),
        keys_(view_of(inputs)),
        q_(bytes_of(inputs.q())),
        w_({inputs.w().data, static_cast<std::size_t>(queries_.tokens * queries_.heads)}),
        cache_(inputs.cache()),
        sketch_(inputs.sketch()),
        block_table_(inputs.block_table()),
        context_lens_(inputs.batch().context_lens),
        row_lens_(inputs.batch().row_lens),
        query_starts_(inputs.batch().next_n > 0 ? std::vector<std::int32_t>{}
                                                : inputs.query_starts()),
        indices_(rows() * static_cast<std::size_t>(config.top_k)),
        scores_(indices_.span().size()),
        heads_(config.router == Router::all ? 0 : rows() * static_cast<std::size_t>(config.heads)),
        residual_(config.residual ? rows() * static_cast<std::size_t>(queries_.dim) : 0),
        sums_(static_cast<std::size_t>(inputs.pages() * sums_stride())),
        largest_(static_cast<std::size_t>(inputs.pages() * largest_stride())) {
    keys_.cache.data = cache_.data();
    if (sums == Sums::tail) {
      keys_.cache = with_tail(keys_.cache);
    } else if (sums != Sums::none) {
      keys_.cache.page_sums = sums_.data();
      keys_.cache.page_sums_stride = sums_stride();
      if (sums == Sums::arrays) {
        keys_.cache.largest_scales = largest_.data();
        keys_.cache.largest_scales_stride = largest_stride();
      }
    }
    rebuild_sums();
    keys_.cache.sketch = inputs.sketch().empty() ? nullptr : sketch_.data();
    keys_.block_table = block_table_.data();
    keys_.context_lens = context_lens_.span();
    keys_.row_lens = row_lens_.span();
    keys_.query_starts = query_starts_.span();
    queries_.data = q_.data();
  }

  // Other inputs of the same shape.
  void replace(const Inputs& inputs) const {
    q_.write(bytes_of(inputs.q()));
    w_.write({inputs.w().data, w_.span().size()});
    cache_.write(inputs.cache());
    sketch_.write(inputs.sketch());
    block_table_.write(inputs.block_table());
    replace_lens(inputs.batch().context_lens);
    rebuild_sums();
  }
  void replace_lens(std::span<const std::int32_t> context_lens) const {
    context_lens_.write(context_lens);
  }

  // Sets the sums of all pages to zero.
  void clear_sums() const {
    const CacheView& cache = keys_.cache;
    for (std::int64_t page = 0; page < cache.pages; ++page) {
      expect_success(cudaMemset(writable(cache.page_sums) + page * cache.page_sums_stride, 0,
                                static_cast<std::size_t>(groups() * cache.dim) * sizeof(float)));
    }
  }

  [[nodiscard]] PagedKeys& keys() { return keys_; }

  void enqueue(const cuda::Plan& plan, std::span<std::byte> workspace, cudaStream_t stream) const {
    const Weights w{w_.data(), queries_.tokens, queries_.heads, 0};
    plan.run(queries_, w, keys_, {indices_.span(), scores_.span(), heads_.span(), residual_.span()},
             workspace, stream);
  }

  [[nodiscard]] Selected result() const {
    return {queries_.tokens, top_k_,        indices_.read(),
            scores_.read(),  heads_.read(), residual_.read()};
  }

  [[nodiscard]] Selected run(const cuda::Plan& plan) const {
    const Guarded<std::byte> workspace(plan.workspace_bytes());
    enqueue(plan, workspace.span(), nullptr);
    expect_success(cudaDeviceSynchronize());
    workspace.expect_red_zones();
    return result();
  }

 private:
  [[nodiscard]] std::size_t rows() const { return static_cast<std::size_t>(queries_.tokens); }

  [[nodiscard]] std::int64_t groups() const { return keys_.cache.page_size / kGroupSize; }
  // Rows are padded; those of sums are a multiple of 16 bytes apart.
  [[nodiscard]] std::int64_t sums_stride() const { return groups() * keys_.cache.dim + 4; }
  [[nodiscard]] std::int64_t largest_stride() const { return groups() + 1; }

  static float* writable(const float* array) { return const_cast<float*>(array); }

  // Sums count all tokens of every page, so that those of the groups that no row sees whole are
  // NaN.
  void rebuild_sums() const {
    const CacheView& cache = keys_.cache;
    if (cache.page_sums == nullptr) {
      return;
    }
    std::vector<std::int32_t> pages(static_cast<std::size_t>(cache.pages));
    std::iota(pages.begin(), pages.end(), 0);
    const Guarded<std::int32_t> on_device{std::span<const std::int32_t>(pages)};
    cuda::rebuild({cache_.data(), cache.pages, cache.dim, cache.page_stride,
                   writable(cache.page_sums), cache.page_size, cache.page_sums_stride,
                   writable(cache.largest_scales), cache.largest_scales_stride},
                  on_device.span(), {}, nullptr);
    expect_success(cudaDeviceSynchronize());
  }

  static PagedKeys view_of(const Inputs& inputs) {
    PagedKeys keys;
    keys.cache.pages = inputs.pages();
    keys.cache.dim = inputs.q().dim;
    keys.cache.page_stride = std::ssize(inputs.cache()) / inputs.pages();
    keys.cache.page_size = inputs.layout().page_size;
    keys.cache.sketch_bits = inputs.layout().sketch;
    keys.cache.sketch_stride = std::ssize(inputs.sketch()) / inputs.pages();
    keys.max_pages = inputs.max_pages();
    keys.next_n = std::max<std::int64_t>(inputs.batch().next_n, 1);
    return keys;
  }

  std::int64_t top_k_;
  Queries queries_;
  PagedKeys keys_;
  Guarded<std::byte> q_;
  Guarded<float> w_;
  Guarded<std::uint8_t> cache_;
  Guarded<std::uint8_t> sketch_;
  Guarded<std::int32_t> block_table_;
  Guarded<std::int32_t> context_lens_;
  Guarded<std::int32_t> row_lens_;
  Guarded<std::int32_t> query_starts_;
  Guarded<std::int32_t> indices_;
  Guarded<float> scores_;
  Guarded<std::int32_t> heads_;
  Guarded<float> residual_;
  Guarded<float> sums_;
  Guarded<float> largest_;
};

bool uses_block_means(const IndexerConfig& config) {
  return config.router == Router::pooled || config.filter_blocks > 0;
}

// Sketches that a cache does not have are computed by the generic kernels alone.
std::vector<NamedConfig> configs_of(const std::string& backend) {
  std::vector<NamedConfig> all = named_configs(kTopK, 2);
  IndexerConfig everything = IndexerConfig::misa_r(kTopK, 2, 100);
  everything.filter_block = 128;
  everything.filter_blocks = 3;
  all.push_back({"hisa x misa-r re-ranked", everything});
  IndexerConfig self = IndexerConfig::misa(kTopK, 2);
  self.router = Router::self;
  all.push_back({"router self", self});
  IndexerConfig pooled = IndexerConfig::misa(kTopK, 2);
  pooled.block = 192;  // divides no power of two
  pooled.residual = true;
  all.push_back({"pooled with a residual row", pooled});
  for (const NamedConfig& named : sketched_configs(kTopK, 2)) {
    if (backend == "cuda-generic") {
      all.push_back(named);
    }
  }
  return all;
}

std::string message_of(const std::function<void()>& act) {
  try {
    act();
  } catch (const Error& error) {
    return error.what();
  }
  return "no error";
}

class DevicePagedPlan : public EachCudaBackend {
 protected:
  [[nodiscard]] cuda::PlanOptions options(const Inputs& inputs) const {
    cuda::PlanOptions options;
    options.batch = inputs.batch().sequences();
    options.backend = GetParam();
    return options;
  }

  [[nodiscard]] cuda::Plan plan(const IndexerConfig& config, const Inputs& inputs) const {
    return cuda::Plan(config, inputs.shape(), options(inputs));
  }

  // Where sums may stand that the indexer reads. Pages of 32 tokens have none.
  static std::vector<Sums> sums_of(const Inputs& inputs, const IndexerConfig& config) {
    std::vector<Sums> all{Sums::none};
    if (uses_block_means(config) && inputs.layout().page_size >= kGroupSize) {
      all.push_back(inputs.layout().tail ? Sums::tail : Sums::arrays);
      all.push_back(Sums::arrays_without_scales);
    }
    return all;
  }

  // Whether the backend scores with Hopper's kernels a sketch that the cache does not have.
  [[nodiscard]] bool lacks_sketch(const Inputs& inputs, const IndexerConfig& config) const {
    const Shape shape = inputs.shape();
    return GetParam() == "cuda-sm90" && shape.dim == 128 && shape.q_dtype == DType::e4m3 &&
           config.sketch != inputs.layout().sketch && config.filter_block == 0 &&
           largest_recipe(config, shape.heads, shape.max_keys).sketched;
  }

  [[nodiscard]] static std::vector<NamedConfig> configs() { return configs_of(GetParam()); }

  void expect_ragged_result(const Inputs& inputs, const std::string& what) const {
    expect_ragged_result(inputs, what, configs());
  }

  void expect_ragged_result(const Inputs& inputs, const std::string& what,
                            const std::vector<NamedConfig>& all) const {
    for (const NamedConfig& named : all) {
      const Selected expected = inputs.expected(context(), named.config);
      for (const Sums sums : sums_of(inputs, named.config)) {
        const Call call(inputs, named.config, sums);
        if (lacks_sketch(inputs, named.config)) {
          EXPECT_THAT(message_of([&] { static_cast<void>(call.run(plan(named.config, inputs))); }),
                      HasSubstr("cache: expected sketches of " +
                                std::to_string(named.config.sketch) + " bits"))
              << named.name << ", " << what;
          continue;
        }
        EXPECT_TRUE(same_bits(call.run(plan(named.config, inputs)), expected))
            << named.name << ", " << what << ", sums " << static_cast<int>(sums);
      }
    }
  }
};

TEST_P(DevicePagedPlan, SmokeMatchesRaggedKeys) {
  const Batch batch = batch_of({700, 0, -3, 47, 1, 1100}, 1);
  for (const std::int64_t dim : {64, 128}) {
    for (const std::int64_t page_size : {32, 64, 128}) {
      const Layout layout{page_size, page_size / 32, 3, 5};
      expect_ragged_result(
          Inputs(batch, layout, {6, dim}),
          "D = " + std::to_string(dim) + ", pages of " + std::to_string(page_size));
    }
  }
}

// Sketches are read where they are those of the config, and computed, or asked for, where they are
// not.
TEST_P(DevicePagedPlan, SmokeSketchesBesideTheCache) {
  for (const int sketch : {2, 4}) {
    for (const std::int64_t dim : {64, 128}) {
      for (const std::int64_t page_size : {32, 64, 128}) {
        Inputs inputs(batch_of({700, 0, 47, 1100}, 2), {page_size, 1, 3, 5, false, sketch},
                      {6, dim});
        const std::string what = std::to_string(sketch) + " bits, D = " + std::to_string(dim) +
                                 ", pages of " + std::to_string(page_size);
        expect_ragged_result(inputs, what, sketched_configs(kTopK, 2));
        inputs.spoil(0, 2, -1);
        inputs.spoil(3, 0, kMost);
        expect_ragged_result(inputs, what + ", entries without a page", sketched_configs(kTopK, 2));
      }
    }
  }
  for (const DType dtype : {DType::bf16, DType::f32}) {
    for (const int sketch : {2, 4}) {
      const Layout layout{64, 0, 1, 6, false, sketch};
      expect_ragged_result(Inputs(batch_of({900, 140}, 1), layout, {6, 128, dtype}), name_of(dtype),
                           sketched_configs(kTopK, 2));
    }
  }
}

// The rows of 64 heads fill those of Hopper's kernels, and more are left to the generic ones.
TEST_P(DevicePagedPlan, ManyHeads) {
  for (const std::int64_t heads : {32, 64, 80}) {
    expect_ragged_result(Inputs(batch_of({900, 5000, 3, 130}, 2), {64, 0, 0, 2}, {heads, 128}),
                         std::to_string(heads) + " heads");
  }
}

TEST_P(DevicePagedPlan, EveryDtypeOfQueries) {
  for (const DType dtype : {DType::bf16, DType::f32}) {
    for (const std::int64_t dim : {64, 128}) {
      expect_ragged_result(Inputs(batch_of({900, 0, 140}, 2), {32, 1, 1, 2}, {6, dim, dtype}),
                           name_of(dtype));
    }
  }
}

TEST_P(DevicePagedPlan, SeveralQueriesOfASequence) {
  const std::vector<std::int64_t> page_sizes{32, 64, 128};
  for (std::int64_t next_n = 1; next_n <= 8; ++next_n) {
    const Layout layout{page_sizes[next_n % 3], next_n % 2, 2, static_cast<std::uint64_t>(next_n)};
    expect_ragged_result(
        Inputs(batch_of({5000, 0, 3, 64, -2, 129, 1025, 4097, 127}, next_n), layout, {6, 128}),
        "next_n = " + std::to_string(next_n));
  }
}

// Blocks of one group and of many, and sequences of few queries and of many.
TEST_P(DevicePagedPlan, SmokePageSums) {
  std::vector<NamedConfig> all;
  for (const int block : {64, 192, 1024}) {
    IndexerConfig misa = IndexerConfig::misa(kTopK, 2);
    misa.block = block;
    all.push_back({"misa, blocks of " + std::to_string(block), misa});
    all.push_back(
        {"hisa, blocks of " + std::to_string(block), IndexerConfig::hisa(kTopK, block, 3)});
  }
  for (const std::int64_t page_size : {64, 128}) {
    for (const bool tail : {false, true}) {
      const Layout layout{page_size, tail ? 1 : 0, 2, 3, tail};
      for (const std::int64_t heads : {6, 40, 64}) {
        expect_ragged_result(Inputs(batch_of({9000, 0, 64, 4097, 2111}, 1), layout, {heads, 128}),
                             "one query", all);
      }
      expect_ragged_result(Inputs(batch_of({5000, 1, 130, 4096}, 3), layout, {64, 128}),
                           "three queries", all);
      expect_ragged_result(Inputs(batch_of({4000, 700, 3000}, {1, 0, 70}), layout, {6, 128}),
                           "some and many queries", all);
      expect_ragged_result(Inputs(batch_of({5000, 700}, 2), layout, {6, 64}), "D = 64", all);
    }
  }
  expect_ragged_result(Inputs(batch_of({3000, 700}, 2), {64, 0, 1, 1}, {6, 128, DType::bf16}),
                       "bf16", all);
}

// More sequences than a thread block has threads.
TEST_P(DevicePagedPlan, PageSumsOfManySequences) {
  std::vector<std::int32_t> lengths(700);
  for (std::size_t b = 0; b < lengths.size(); ++b) {
    lengths[b] = static_cast<std::int32_t>(b * 37 % 500) - 20;
  }
  lengths[600] = 20000;
  expect_ragged_result(Inputs(batch_of(lengths, 1), {64, 0, 1, 3}, {6, 128}), "many sequences");
}

// More blocks than the registers of a thread block hold. Many queries at once are filtered by a
// warp each, few by a thread block each.
TEST_P(DevicePagedPlan, ManyBlocks) {
  const Inputs inputs(batch_of({64 * 8192 + 5000}, 300), {128, 0, 1, 3}, {6, 64});
  const IndexerConfig config = IndexerConfig::hisa(kTopK, 64, 40);
  const Selected expected = inputs.expected(context(), config);
  Shape few = inputs.shape();
  few.tokens = 10;
  cuda::PlanOptions small = options(inputs);
  small.workspace_cap = cuda::Plan(config, few, options(inputs)).workspace_bytes();
  for (const Sums sums : {Sums::none, Sums::arrays}) {
    const Call call(inputs, config, sums);
    EXPECT_TRUE(same_bits(call.run(plan(config, inputs)), expected));
    EXPECT_TRUE(same_bits(call.run(cuda::Plan(config, inputs.shape(), small)), expected));
  }
}

// The sums are read where they may be, in place of the keys.
TEST_P(DevicePagedPlan, OtherPageSumsGiveOtherResults) {
  const Layout layout{64, 0, 1, 3, true};
  const Inputs inputs(batch_of({5 * 1024, 7 * 1024}, 1), layout, {6, 128});
  for (const NamedConfig& named : std::vector<NamedConfig>{
           {"misa", IndexerConfig::misa(kTopK, 2)}, {"hisa", IndexerConfig::hisa(kTopK, 128, 3)}}) {
    for (const Sums sums : {Sums::arrays, Sums::arrays_without_scales, Sums::tail}) {
      const Call call(inputs, named.config, sums);
      call.clear_sums();
      EXPECT_FALSE(
          same_bits(call.run(plan(named.config, inputs)), inputs.expected(context(), named.config)))
          << named.name;
    }
  }
}

// As in prefill, or where speculative decoding leaves different numbers of rows.
TEST_P(DevicePagedPlan, SmokeDifferentNumbersOfQueries) {
  for (const std::int64_t page_size : {32, 64, 128}) {
    Batch batch = batch_of({300, 700, 64, 1300, 0, 5}, {0, 3, 1, 70, 2, 0});
    expect_ragged_result(Inputs(batch, {page_size, 0, 1, 7}, {6, 128}), "query_starts");
    batch.outside_before = 2;
    batch.outside_after = 5;
    expect_ragged_result(Inputs(batch, {page_size, 0, 1, 7}, {6, 128}), "padding rows");
  }
}

TEST_P(DevicePagedPlan, SmokeLengthsByRow) {
  Batch batch = batch_of({700, 64, 1300}, 4);
  batch.row_lens = {700, -5, 1, 699, 64, 64, 0, kLeast, 129, 1300, 47, 1024};
  for (const std::int64_t page_size : {32, 64, 128}) {
    expect_ragged_result(Inputs(batch, {page_size, 2, 1, 7}, {6, 128}), "row_lens");
    Batch uneven = batch;
    uneven.next_n = 0;
    uneven.queries = {5, 1, 6};
    expect_ragged_result(Inputs(uneven, {page_size, 2, 1, 7}, {6, 128}),
                         "row_lens and query_starts");
  }
}

// A block table with a row for each query is read as one row for each sequence (docs/decode.md), by
// a stride over the others, so that the queries of a sequence share their reads.
TEST_P(DevicePagedPlan, SmokeATableRowForEachQuery) {
  constexpr std::int64_t kNextN = 4;
  const Inputs inputs(batch_of({700, 0, 64, 1300}, kNextN), {64, 1, 2, 7}, {6, 128});
  const std::vector<std::int32_t>& rows = inputs.block_table();
  std::vector<std::int32_t> flat;
  for (std::int64_t b = 0; b < inputs.batch().sequences(); ++b) {
    for (std::int64_t i = 0; i < kNextN; ++i) {
      const auto row = rows.begin() + b * inputs.max_pages();
      flat.insert(flat.end(), row, row + inputs.max_pages());
    }
  }
  const Guarded<std::int32_t> table{std::span<const std::int32_t>(flat)};
  for (const NamedConfig& named : configs()) {
    if (lacks_sketch(inputs, named.config)) {
      continue;
    }
    Call call(inputs, named.config);
    call.keys().block_table = table.data();
    call.keys().block_table_stride = kNextN * inputs.max_pages();
    EXPECT_TRUE(
        same_bits(call.run(plan(named.config, inputs)), inputs.expected(context(), named.config)))
        << named.name;
  }
}

// Rows of more columns than the registers of one thread block hold.
TEST_P(DevicePagedPlan, LongRows) {
  std::vector<NamedConfig> all = configs();
  IndexerConfig many = IndexerConfig::misa_r(2048, 3, 8192);
  all.push_back({"misa-r 2048 of 8192", many});
  all.push_back({"hisa 2048", IndexerConfig::hisa(2048, 128, 64)});
  expect_ragged_result(Inputs(batch_of({20000, 40, 33000}, 2), {64, 1, 5, 3}, {8, 128}), "long",
                       all);
}

// As long as a row may be, for as many heads as Hopper's kernels take.
TEST_P(DevicePagedPlan, AMillionKeys) {
  const Batch batch = batch_of({1000000}, 1);
  const Numbers numbers{64, 128};
  static const Pack pack = make_pack(Inputs::spec_of(batch, numbers));
  for (const int sketch : {2, 4}) {
    const Inputs inputs(batch, {64, 0, 1, 3, false, sketch}, numbers, pack);
    IndexerConfig misa_r = IndexerConfig::misa_r(2048, 3, 8192);
    misa_r.sketch = sketch;
    std::vector<NamedConfig> all{{"misa-r on a sketch", misa_r}};
    if (sketch == 2) {
      all.push_back({"dsa", IndexerConfig::dsa(2048)});
      all.push_back({"misa", IndexerConfig::misa(2048, 8)});
      all.push_back({"misa-r", IndexerConfig::misa_r(2048, 8)});
      all.push_back({"hisa", IndexerConfig::hisa(2048, 128, 64)});
    } else {
      IndexerConfig every_head = IndexerConfig::dsa(2048);
      every_head.candidates = 4096;
      every_head.sketch = sketch;
      all.push_back({"every head on a sketch", every_head});
    }
    expect_ragged_result(inputs, std::to_string(sketch) + " bits", all);
  }
}

// Decode, drafts and chunks of a prefill, in shapes that Hopper's kernels take.
TEST_P(DevicePagedPlan, FewerMultiprocessorsChangeNothing) {
  const std::vector<Batch> batches{batch_of({9000, 0, 130, 20000}, 1), batch_of({5000, 700, 3}, 4),
                                   batch_of({3000, 900}, {300, 90})};
  for (const Batch& batch : batches) {
    for (const int sketch : {2, 4}) {
      for (const std::int64_t heads : {8, 64}) {
        const Inputs inputs(batch, {64, 0, 1, 3, false, sketch}, {heads, 128});
        std::vector<NamedConfig> all =
            sketch == 2 ? named_configs(kTopK, 3) : std::vector<NamedConfig>{};
        for (const NamedConfig& named : sketched_configs(kTopK, 3, sketch)) {
          all.push_back(named);
        }
        for (const NamedConfig& named : all) {
          const Selected expected = inputs.expected(context(), named.config);
          Shape shape = inputs.shape();
          const std::int64_t longest = shape.max_keys;
          for (const int max_sms : {0, 3, 17}) {
            cuda::PlanOptions limited = options(inputs);
            limited.max_sms = max_sms;
            // Few rows that are planned to be long are selected by clusters.
            for (const std::int64_t planned : {longest, std::int64_t{1} << 18}) {
              if (planned > longest && shape.tokens > 12) {
                continue;
              }
              shape.max_keys = planned;
              const cuda::Plan plan(named.config, shape, limited);
              for (const Sums sums : sums_of(inputs, named.config)) {
                EXPECT_TRUE(same_bits(Call(inputs, named.config, sums).run(plan), expected))
                    << named.name << ", " << heads << " heads, " << shape.tokens << " queries on "
                    << max_sms << " multiprocessors, planned for " << planned << ", sums "
                    << static_cast<int>(sums);
              }
            }
          }
        }
      }
    }
  }
}

// A cache and a block table at their usual sizes have pages and entries that are never read.
TEST_P(DevicePagedPlan, WideTables) {
  const Inputs inputs(batch_of({300, 1, 900}, 1), {64, 0, 16384, 3}, {6, 128});
  for (const NamedConfig& named : configs()) {
    Shape shape = inputs.shape();
    shape.max_keys = 1 << 20;
    cuda::PlanOptions wide = options(inputs);
    wide.batch = 16;
    const cuda::Plan plan(named.config, shape, wide);
    const Selected expected = inputs.expected(context(), named.config);
    for (const Sums sums : sums_of(inputs, named.config)) {
      EXPECT_TRUE(same_bits(Call(inputs, named.config, sums).run(plan), expected)) << named.name;
    }
  }
}

TEST_P(DevicePagedPlan, SmokeEntriesWithoutAPage) {
  for (const std::int64_t page_size : {32, 64, 128}) {
    Inputs inputs(batch_of({700, 40, 1300}, 2), {page_size, 1, 1, 4}, {6, 128});
    inputs.spoil(0, 2, -1);
    inputs.spoil(1, 0, static_cast<std::int32_t>(inputs.pages()));  // the whole sequence
    inputs.spoil(2, 0, kMost);
    inputs.spoil(2, 1300 / page_size, kLeast);  // the last page
    expect_ragged_result(inputs, "pages of " + std::to_string(page_size));
  }
}

// A key without a page is selected only where there are too few others. A residual row that was
// fitted to such keys makes all scores NaN.
TEST_P(DevicePagedPlan, KeysWithoutAPageRankLast) {
  Inputs inputs(batch_of({300}, 1), {64, 0, 0, 4}, {6, 128});
  inputs.spoil(0, 1, -7);
  for (const NamedConfig& named : configs()) {
    if (named.config.residual) {
      continue;
    }
    const Call call(inputs, named.config);
    const Selected result = call.run(plan(named.config, inputs));
    for (const std::int32_t position : result.indices) {
      EXPECT_TRUE(position < 64 || position >= 128) << named.name << ": " << position;
    }
  }
}

TEST_P(DevicePagedPlan, SmokeMemoryChangesNothing) {
  // More queries than are filtered by a thread block each; with little memory a chunk has fewer.
  const Inputs inputs(batch_of({700, 2, 900}, {240, 3, 160}), {64, 0, 1, 7}, {6, 128});
  for (const NamedConfig& named : configs()) {
    const Call call(inputs, named.config);
    cuda::PlanOptions small = options(inputs);
    const auto fits = [&](std::size_t cap) {
      small.workspace_cap = cap;
      try {
        return cuda::Plan(named.config, inputs.shape(), small).workspace_bytes() <= cap;
      } catch (const Error& error) {
        EXPECT_EQ(error.code(), ErrorCode::workspace) << error.what();
        return false;
      }
    };
    std::size_t cap = 1;
    while (!fits(cap) && cap < (std::size_t{1} << 30)) {
      cap *= 2;
    }
    const cuda::Plan plan(named.config, inputs.shape(), small);
    const Selected expected = inputs.expected(context(), named.config);
    EXPECT_TRUE(same_bits(call.run(plan), expected)) << named.name << " in " << cap << " bytes";
    const Call with_sums(inputs, named.config, Sums::arrays);
    EXPECT_TRUE(same_bits(with_sums.run(plan), expected))
        << named.name << " in " << cap << " bytes, with sums";
  }
}

// A captured call sees the lengths, tables and keys of its replay.
TEST_P(DevicePagedPlan, SmokeAGraphReplaysWithOtherData) {
  const auto inputs_of = [](std::vector<std::int32_t> context_lens, std::uint64_t seed) {
    Batch batch = batch_of(std::move(context_lens), 2);
    batch.keys = {1500, 1500, 1500, 1500};  // a cache of one size
    return Inputs(batch, {64, 1, 1, seed}, {6, 128, DType::e4m3, seed});
  };
  const Inputs first = inputs_of({1500, 1, 300, 64}, 1);
  const Inputs second = inputs_of({2, 1500, 0, 65}, 2);
  const Inputs empty = inputs_of({-1, -9, 0, 0}, 3);
  const std::array<const Inputs*, 4> replays{&first, &second, &empty, &first};
  for (const NamedConfig& named : configs()) {
    const Call call(first, named.config, Sums::arrays);
    const cuda::Plan plan = this->plan(named.config, first);
    const Guarded<std::byte> workspace(plan.workspace_bytes());
    cudaStream_t stream = nullptr;
    expect_success(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
    expect_success(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    call.enqueue(plan, workspace.span(), stream);
    cudaGraph_t graph = nullptr;
    expect_success(cudaStreamEndCapture(stream, &graph));
    cudaGraphExec_t executable = nullptr;
    expect_success(cudaGraphInstantiate(&executable, graph, 0));
    for (std::size_t i = 0; i < replays.size(); ++i) {
      call.replace(*replays[i]);
      expect_success(cudaDeviceSynchronize());
      expect_success(cudaGraphLaunch(executable, stream));
      expect_success(cudaStreamSynchronize(stream));
      EXPECT_TRUE(same_bits(call.result(), replays[i]->expected(context(), named.config)))
          << named.name << ", replay " << i;
    }
    expect_success(cudaGraphExecDestroy(executable));
    expect_success(cudaGraphDestroy(graph));
    expect_success(cudaStreamDestroy(stream));
  }
}

// Lengths that no host ever saw are cut off at the block table and at the planned length.
TEST_P(DevicePagedPlan, SmokeLengthsAreClamped) {
  Batch batch = batch_of({kMost, kLeast, 641, 640, kMost - 1}, 2);
  batch.keys = {640, 640, 640, 640, 640};
  for (const std::int64_t page_size : {32, 64, 128}) {
    const Inputs inputs(batch, {page_size, 0, 0, 9}, {6, 128});
    expect_ragged_result(inputs, "cut off at the table");
    for (const NamedConfig& named : configs()) {
      const Call call(inputs, named.config);
      Shape shape = inputs.shape();
      shape.max_keys = 500;
      EXPECT_TRUE(same_bits(call.run(cuda::Plan(named.config, shape, options(inputs))),
                            inputs.expected(context(), named.config, 500)))
          << named.name << ", cut off as planned";
    }
  }
}

// Whatever query_starts holds, nothing is read or written out of bounds.
TEST_P(DevicePagedPlan, SmokeQueryStartsAreClamped) {
  const Inputs inputs(batch_of({700, 2, 900}, {4, 3, 5}), {64, 0, 1, 7}, {6, 128});
  const std::vector<std::vector<std::int32_t>> wrong{
      {kLeast, kMost, kLeast, kMost}, {kMost, kMost, kMost, kMost}, {9, 6, 3, 0}, {0, -4, 20, 12}};
  for (const std::vector<std::int32_t>& starts : wrong) {
    const Guarded<std::int32_t> on_device{std::span<const std::int32_t>(starts)};
    for (const NamedConfig& named : configs()) {
      Call call(inputs, named.config);
      call.keys().query_starts = on_device.span();
      const Selected result = call.run(plan(named.config, inputs));
      for (const std::int32_t position : result.indices) {
        EXPECT_TRUE(position >= -1 && position < 900) << named.name;
      }
    }
  }
}

TEST_P(DevicePagedPlan, SmokeACacheWithoutPages) {
  const Inputs inputs(batch_of({700, 2}, 1), {}, {});
  for (const NamedConfig& named : configs()) {
    Call call(inputs, named.config);
    call.keys().cache.pages = 0;
    EXPECT_THAT(call.run(plan(named.config, inputs)).indices, ::testing::Each(-1)) << named.name;
  }
}

TEST_P(DevicePagedPlan, RefusesBadArguments) {
  const IndexerConfig config = IndexerConfig::dsa(kTopK);
  const Inputs inputs(batch_of({700, 2}, 2), {}, {});
  const auto plan_with = [&](const std::function<void(Shape&, cuda::PlanOptions&)>& change) {
    return message_of([&] {
      Shape shape = inputs.shape();
      cuda::PlanOptions changed = options(inputs);
      change(shape, changed);
      const cuda::Plan plan(config, shape, changed);
    });
  };
  EXPECT_EQ(plan_with([](auto&, auto&) {}), "no error");
  EXPECT_THAT(plan_with([](auto&, auto& changed) { changed.batch = -1; }), HasSubstr("batch: "));
  EXPECT_THAT(plan_with([](auto&, auto& changed) { changed.batch = 1 << 21; }),
              HasSubstr("batch: expected 0 (ragged keys) to 2097151 with max_keys = 700"));
  EXPECT_THAT(plan_with([](auto& shape, auto&) { shape.k_dtype = DType::bf16; }),
              HasSubstr("k_dtype: expected e4m3 with paged keys"));

  const cuda::Plan plan = this->plan(config, inputs);
  const Guarded<std::byte> workspace(plan.workspace_bytes());
  const auto run_with = [&](const std::function<void(PagedKeys&)>& change) {
    Call call(inputs, config);
    change(call.keys());
    return message_of([&] { call.enqueue(plan, workspace.span(), nullptr); });
  };
  EXPECT_EQ(run_with([](auto&) {}), "no error");
  EXPECT_THAT(run_with([](auto& k) { k.cache.data += 4; }), HasSubstr("cache: expected data"));
  EXPECT_THAT(run_with([](auto& k) { k.cache.page_stride += 4; }),
              HasSubstr("cache: expected a page stride that is a multiple of 16"));
  EXPECT_THAT(run_with([](auto& k) { k.cache.page_size = 48; }),
              HasSubstr("cache: expected a page size of 32, 64 or 128, got 48"));
  EXPECT_THAT(run_with([](auto& k) {
                k.cache.dim = 128;
                k.cache.page_stride = 0;
              }),
              HasSubstr("cache: expected D = 64"));
  EXPECT_THAT(run_with([](auto& k) { k.cache.pages = std::int64_t{1} << 26; }),
              HasSubstr("cache: expected at most 4294967295 keys"));
  EXPECT_THAT(run_with([](auto& k) { k.next_n = 3; }), HasSubstr("q: expected T = batch * next_n"));
  EXPECT_THAT(run_with([](auto& k) { k.row_lens = k.context_lens; }),
              HasSubstr("row_lens: expected 4 entries"));
  EXPECT_THAT(run_with([](auto& k) { k.max_pages = -1; }), HasSubstr("block_table: "));
  const auto* sums = reinterpret_cast<const float*>(workspace.data());
  EXPECT_THAT(run_with([&](auto& k) { k.cache.page_sums = sums + 1; }),
              HasSubstr("page_sums: expected data aligned to 16 bytes"));
  EXPECT_THAT(run_with([&](auto& k) {
                k.cache.page_sums = sums;
                k.cache.page_sums_stride = 66;
              }),
              HasSubstr("page_sums: expected rows a multiple of 16 bytes apart"));
  EXPECT_THAT(run_with([](auto& k) { k.cache.sketch_bits = 2; }),
              HasSubstr("sketch: expected data"));
  EXPECT_THAT(run_with([](auto& k) {
                k.cache.sketch = k.cache.data;
                k.cache.sketch_bits = 3;
              }),
              HasSubstr("sketch_bits: expected 0 (none), 2 or 4, got 3"));

  const Inputs larger(batch_of({700, 2, 1}, 1), {}, {});
  const Call three(larger, config);
  EXPECT_THAT(message_of([&] { three.enqueue(plan, workspace.span(), nullptr); }),
              HasSubstr("context_lens: expected a batch of 2 at most, as planned, got 3"));
  cuda::PlanOptions of_ragged = options(inputs);
  of_ragged.batch = 0;
  of_ragged.total_keys = 700;
  const cuda::Plan ragged(config, inputs.shape(), of_ragged);
  const Call call(inputs, config);
  EXPECT_THAT(message_of([&] { call.enqueue(ragged, workspace.span(), nullptr); }),
              HasSubstr("k: expected ragged keys, as planned"));
}

INSTANTIATE_TEST_SUITE_P(Each, DevicePagedPlan, ::testing::ValuesIn(cuda_backends_of_this_build()),
                         backend_name);

}  // namespace
}  // namespace misa::test
