// SPDX-License-Identifier: Apache-2.0
// Every wrong argument is refused with a message that names it, and nothing is written.
#include <gmock/gmock.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "api/validate.hpp"
#include "core/workspace.hpp"
#include "misa/misa.hpp"

namespace misa {
namespace {

using ::testing::AnyOf;
using ::testing::Each;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

constexpr std::int64_t kTokens = 4;
constexpr std::int64_t kHeads = 8;
constexpr std::int64_t kDim = 64;
constexpr std::int64_t kKeys = 100;
constexpr std::int64_t kPages = 4;
constexpr std::int64_t kMaxPages = 2;
constexpr int kTopK = 16;
constexpr std::int64_t kHuge = std::int64_t{1} << 60;

constexpr std::int32_t kPoisonIndex = -77;
constexpr float kPoisonScore = -77.0F;

// The arrays that a call reads and writes; their values do not matter here.
struct Buffers {
  std::vector<float> q = std::vector<float>(kTokens * kHeads * kDim);
  std::vector<float> w = std::vector<float>(kTokens * kHeads);
  std::vector<std::uint8_t> k = std::vector<std::uint8_t>(kKeys * kDim);
  std::vector<float> k_scale = std::vector<float>(kKeys);
  std::vector<std::int32_t> ks{0, 0, 10, 10};
  std::vector<std::int32_t> ke{50, 51, 99, 100};
  std::vector<std::uint8_t> cache = std::vector<std::uint8_t>(kPages * 64 * (kDim + 4));
  // Two sequences of two queries; the last page of the second is beyond its context.
  std::vector<std::int32_t> block_table{3, 1, 0, 1000};
  std::vector<std::int32_t> context_lens{128, 64};
  std::vector<std::int32_t> query_starts{0, 3, 4};
  std::vector<std::int32_t> row_lens{128, -1, 64, 0};
  std::vector<std::int32_t> indices = std::vector<std::int32_t>(kTokens * kTopK, kPoisonIndex);
  std::vector<float> scores = std::vector<float>(kTokens * kTopK, kPoisonScore);
  std::vector<std::int32_t> heads = std::vector<std::int32_t>(kTokens * 2, kPoisonIndex);
  std::vector<float> residual = std::vector<float>(kTokens * kDim, kPoisonScore);
};

// A correct call, of which each case makes one argument wrong.
template <class Keys>
struct Call {
  IndexerConfig config = IndexerConfig::misa_r(kTopK, 2);
  Shape shape{kTokens, kHeads, kDim, 128, DType::f32, DType::e4m3};
  Queries q;
  Weights w;
  Keys k;
  Selection out;

  explicit Call(Buffers& b)
      : q{b.q.data(), DType::f32, kTokens, kHeads, kDim},
        w{b.w.data(), kTokens, kHeads},
        out{b.indices, b.scores, b.heads, b.residual} {
    if constexpr (std::is_same_v<Keys, RaggedKeys>) {
      k = {b.k.data(), DType::e4m3, kKeys, kDim, 0, b.k_scale.data(), b.ks, b.ke};
    } else {
      k = {{b.cache.data(), kPages, kDim}, b.block_table.data(), kMaxPages, 0, b.context_lens, 2};
    }
  }

  void run() const {
    const Plan plan(Context({.backend = "reference", .threads = 1}), config, shape);
    plan.run(q, w, k, out, {});
  }
};

template <class Keys>
struct Case {
  std::string argument;
  std::string expected;  // part of the message
  std::function<void(Call<Keys>&, Buffers&)> spoil;
};

template <class Keys>
void expect_refused(const Case<Keys>& test) {
  SCOPED_TRACE(test.argument + ": … " + test.expected);
  Buffers buffers;
  Call<Keys> call(buffers);
  test.spoil(call, buffers);
  try {
    call.run();
    ADD_FAILURE() << "expected an error";
  } catch (const Error& error) {
    const std::string message = error.what();
    EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
    EXPECT_THAT(message,
                AnyOf(StartsWith(test.argument + ": expected "), StartsWith(test.argument + "[")));
    EXPECT_THAT(message, HasSubstr(": expected "));
    EXPECT_THAT(message, HasSubstr(", got "));
    EXPECT_THAT(message, HasSubstr(test.expected));
    EXPECT_THAT(message, Not(HasSubstr("\n")));
  }
  EXPECT_THAT(buffers.indices, Each(kPoisonIndex));
  EXPECT_THAT(buffers.scores, Each(kPoisonScore));
  EXPECT_THAT(buffers.heads, Each(kPoisonIndex));
  EXPECT_THAT(buffers.residual, Each(kPoisonScore));
}

template <class T>
const T* misaligned(const T* data) {
  return reinterpret_cast<const T*>(reinterpret_cast<const char*>(data) + 1);
}

// The cases that ragged and paged keys have in common.
template <class Keys>
std::vector<Case<Keys>> common_cases() {
  using C = Call<Keys>;
  using B = Buffers;
  return {
      {"q", "data for 4", [](C& c, B&) { c.q.data = nullptr; }},
      {"q", "aligned to 4",
       [](C& c, B&) { c.q.data = misaligned(static_cast<const float*>(c.q.data)); }},
      {"q", "got dtype 3", [](C& c, B&) { c.q.dtype = static_cast<DType>(3); }},
      {"q", "H = 1 to 256, got 0", [](C& c, B&) { c.q.heads = 0; }},
      {"q", "H = 1 to 256, got 257", [](C& c, B&) { c.q.heads = 257; }},
      {"q", "H = 1 to 256, got -8", [](C& c, B&) { c.q.heads = -8; }},
      {"q", "D = 64 or 128, got 96", [](C& c, B&) { c.q.dim = 96; }},
      {"q", "D = 64 or 128, got 0", [](C& c, B&) { c.q.dim = 0; }},
      {"q", "T = 0 or more, got -1", [](C& c, B&) { c.q.tokens = -1; }},
      {"q", "head stride of at least 64, got 63", [](C& c, B&) { c.q.head_stride = 63; }},
      {"q", "head stride of at least 64, got -64", [](C& c, B&) { c.q.head_stride = -64; }},
      {"q", "token stride of at least 512, got 511", [](C& c, B&) { c.q.token_stride = 511; }},
      {"q", "token stride of at least 512, got -512", [](C& c, B&) { c.q.token_stride = -512; }},
      {"q", "token stride of at least 64, got 63",
       [](C& c, B&) { c.q.head_stride = 256, c.q.token_stride = 63; }},
      {"q", "head stride of at least 256, got 255",
       [](C& c, B&) { c.q.head_stride = 255, c.q.token_stride = 64; }},
      {"q", "token stride of at least 624, got 512",
       [](C& c, B&) { c.q.head_stride = 80, c.q.token_stride = 512; }},
      {"q", "below 2^63", [](C& c, B&) { c.q.tokens = c.w.tokens = kHuge; }},
      {"q", "below 2^63", [](C& c, B&) { c.q.head_stride = kHuge; }},
      {"q", "below 2^63", [](C& c, B&) { c.q.token_stride = std::int64_t{1} << 61; }},
      {"w", "T = 4 as q has, got 3", [](C& c, B&) { c.w.tokens = 3; }},
      {"w", "H = 8 as q has, got 7", [](C& c, B&) { c.w.heads = 7; }},
      {"w", "data for 4", [](C& c, B&) { c.w.data = nullptr; }},
      {"w", "aligned to 4", [](C& c, B&) { c.w.data = misaligned(c.w.data); }},
      {"w", "token stride of at least 8, got 7", [](C& c, B&) { c.w.token_stride = 7; }},
      {"w", "token stride of at least 8, got -8", [](C& c, B&) { c.w.token_stride = -8; }},
      {"w", "below 2^63", [](C& c, B&) { c.w.token_stride = std::int64_t{1} << 61; }},

      {"top_k", "1 or more, got 0", [](C& c, B&) { c.config.top_k = 0; }},
      {"top_k", "1 or more, got -1", [](C& c, B&) { c.config.top_k = -1; }},
      {"router", "got 8", [](C& c, B&) { c.config.router = static_cast<Router>(8); }},
      {"heads", "1 to H = 8, got 0",
       [](C& c, B&) { c.config.residual = false, c.config.heads = 0; }},
      {"heads", "0 to H = 8, got 9", [](C& c, B&) { c.config.heads = 9; }},
      {"heads", "0 to H = 8, got -1", [](C& c, B&) { c.config.heads = -1; }},
      {"residual", "got 'all'", [](C& c, B&) { c.config.router = Router::all; }},
      {"block", "got 0", [](C& c, B&) { c.config.block = 0; }},
      {"block", "got 100", [](C& c, B&) { c.config.block = 100; }},
      {"block", "got -64", [](C& c, B&) { c.config.block = -64; }},
      {"filter_block", "got 100", [](C& c, B&) { c.config.filter_block = 100; }},
      {"filter_block", "got -64", [](C& c, B&) { c.config.filter_block = -64; }},
      {"filter_blocks", "2 or more, got 1",
       [](C& c, B&) { c.config.filter_block = 64, c.config.filter_blocks = 1; }},
      {"filter_blocks", "top_k = 66 positions, got 2, which may keep only 65",
       [](C& c, B&) {
         c.config.filter_block = 64, c.config.filter_blocks = 2, c.config.top_k = 66;
       }},
      {"candidates", "at least top_k = 16, got 15", [](C& c, B&) { c.config.candidates = 15; }},
      {"candidates", "at least top_k = 16, got -1", [](C& c, B&) { c.config.candidates = -1; }},
      {"sketch", "0 (none), 2 or 4, got 3",
       [](C& c, B&) { c.config.candidates = 32, c.config.sketch = 3; }},
      {"sketch", "0 (none), 2 or 4, got -2",
       [](C& c, B&) { c.config.candidates = 32, c.config.sketch = -2; }},
      {"sketch", "0 (none) with bf16 keys, got 4",
       [](C& c, B&) {
         c.config.candidates = 32, c.config.sketch = 4, c.shape.k_dtype = DType::bf16;
       }},
      {"candidates", "at least top_k = 16 with a sketch, which needs a re-rank, got 0",
       [](C& c, B&) { c.config.candidates = 0, c.config.sketch = 2; }},
      {"dense_work", "0 (none) or more, got -1", [](C& c, B&) { c.config.dense_work = -1; }},
      {"static_heads", "none with router 'nonlinearity', got 2",
       [](C& c, B&) {
         c.config.static_heads = {0, 1};
       }},
      {"static_heads", "2 (heads), got 0", [](C& c, B&) { c.config.router = Router::fixed; }},
      {"static_heads", "2 (heads), got 3",
       [](C& c, B&) {
         c.config.router = Router::fixed, c.config.static_heads = {0, 1, 2};
       }},
      {"static_heads", "[1]: expected 0 to 7, got 8",
       [](C& c, B&) {
         c.config.router = Router::fixed, c.config.static_heads = {0, 8};
       }},
      {"static_heads", "[0]: expected 0 to 7, got -1",
       [](C& c, B&) {
         c.config.router = Router::fixed, c.config.static_heads = {-1, 0};
       }},
      {"static_heads", "[1]: expected distinct heads, got 5 again",
       [](C& c, B&) {
         c.config.router = Router::fixed, c.config.static_heads = {5, 5};
       }},

      {"shape", "T = 0 or more, got -1", [](C& c, B&) { c.shape.tokens = -1; }},
      {"shape", "H = 1 to 256, got 0", [](C& c, B&) { c.shape.heads = 0; }},
      {"shape", "H = 1 to 256, got 257", [](C& c, B&) { c.shape.heads = 257; }},
      {"shape", "D = 64 or 128, got 32", [](C& c, B&) { c.shape.dim = 32; }},
      {"shape", "got -1", [](C& c, B&) { c.shape.max_keys = -1; }},
      {"shape", "got 2147483648",
       [](C& c, B&) { c.shape.max_keys = std::int64_t{std::numeric_limits<int>::max()} + 1; }},
      {"shape.q_dtype", "got dtype 9", [](C& c, B&) { c.shape.q_dtype = static_cast<DType>(9); }},
      {"shape.k_dtype", "got dtype 9", [](C& c, B&) { c.shape.k_dtype = static_cast<DType>(9); }},
      {"top_k", "below 2^63", [](C& c, B&) { c.shape.tokens = kHuge; }},
      {"q", "T = 3 at most, as planned, got 4", [](C& c, B&) { c.shape.tokens = 3; }},
      {"q", "H = 16 as planned, got 8", [](C& c, B&) { c.shape.heads = 16; }},
      {"q", "D = 128 as planned, got 64", [](C& c, B&) { c.shape.dim = 128; }},
      {"q", "bf16 as planned, got f32", [](C& c, B&) { c.shape.q_dtype = DType::bf16; }},
      {"k", "bf16 as planned, got e4m3", [](C& c, B&) { c.shape.k_dtype = DType::bf16; }},
      {"k", "89 keys a query at most, as planned, got", [](C& c, B&) { c.shape.max_keys = 89; }},

      {"indices", "4 * 16 elements, got 63",
       [](C& c, B&) { c.out.indices = c.out.indices.first(63); }},
      {"scores", "4 * 16 elements, got 32",
       [](C& c, B&) { c.out.scores = c.out.scores.first(32); }},
      {"indices", "row stride of at least 16, got 15", [](C& c, B&) { c.out.index_stride = 15; }},
      {"scores", "row stride of at least 16, got -16", [](C& c, B&) { c.out.score_stride = -16; }},
      {"indices", "4 * 16 elements, got 64 with rows 17 apart",
       [](C& c, B&) { c.out.index_stride = 17; }},
      {"scores", "below 2^63", [](C& c, B&) { c.out.score_stride = std::int64_t{1} << 62; }},
      {"offsets", "4 entries (T) or none, got 3",
       [](C& c, B& b) { c.out.offsets = std::span(b.row_lens).first(3); }},
      {"offsets", "aligned to 4",
       [](C& c, B& b) {
         c.out.offsets = {misaligned(b.row_lens.data()), 4};
       }},
      {"heads", "4 * 2 elements, got 4", [](C& c, B&) { c.out.heads = c.out.heads.first(4); }},
      {"heads", "none with router 'all', got 8",
       [](C& c, B&) { c.config = IndexerConfig::dsa(16); }},
      {"residual", "4 * 64 elements, got 1",
       [](C& c, B&) { c.out.residual = c.out.residual.first(1); }},
      {"residual", "none without a residual row, got 256",
       [](C& c, B&) { c.config.residual = false; }},
      {"indices", "got null",
       [](C& c, B&) {
         c.out.indices = {static_cast<std::int32_t*>(nullptr), 64};
       }},
  };
}

TEST(Arguments, RaggedSmoke) {
  using C = Call<RaggedKeys>;
  using B = Buffers;
  auto cases = common_cases<RaggedKeys>();
  const std::vector<Case<RaggedKeys>> ragged{
      {"k", "got dtype 7", [](C& c, B&) { c.k.dtype = static_cast<DType>(7); }},
      {"k", "D = 64 as q has, got 128", [](C& c, B&) { c.k.dim = 128; }},
      {"k", "got -1", [](C& c, B&) { c.k.tokens = -1; }},
      {"k", "L = 0 to 2147483647, got 1152921504606846976", [](C& c, B&) { c.k.tokens = kHuge; }},
      {"k", "data for 100", [](C& c, B&) { c.k.data = nullptr; }},
      {"k", "aligned to 2",
       [](C& c, B& b) {
         c.k.dtype = DType::bf16, c.k.scale = nullptr, c.k.data = misaligned(b.k_scale.data());
       }},
      {"k", "token stride of at least 64, got 63", [](C& c, B&) { c.k.token_stride = 63; }},
      {"k", "token stride of at least 64, got -64", [](C& c, B&) { c.k.token_stride = -64; }},
      {"k", "below 2^63", [](C& c, B&) { c.k.token_stride = kHuge; }},
      {"k_scale", "got null", [](C& c, B&) { c.k.scale = nullptr; }},
      {"k_scale", "aligned to 4", [](C& c, B&) { c.k.scale = misaligned(c.k.scale); }},
      {"k_scale", "none with bf16 keys", [](C& c, B&) { c.k.dtype = DType::bf16; }},
      {"ks", "4 entries (T), got 3", [](C& c, B&) { c.k.starts = c.k.starts.first(3); }},
      {"ke", "4 entries (T), got 0", [](C& c, B&) { c.k.ends = {}; }},
      {"ks", "[2]: expected 0 to L = 100, got -1", [](C&, B& b) { b.ks[2] = -1; }},
      {"ks", "[2]: expected 0 to L = 100, got 101", [](C&, B& b) { b.ks[2] = 101; }},
      {"ke", "[3]: expected 0 to L = 100, got -5", [](C&, B& b) { b.ke[3] = -5; }},
      {"ke", "[3]: expected 0 to L = 100, got 101", [](C&, B& b) { b.ke[3] = 101; }},
      {"ke", "[0]: expected 0 to L = 100, got 2147483647",
       [](C&, B& b) { b.ke[0] = std::numeric_limits<std::int32_t>::max(); }},
      {"slots", "false with ragged keys", [](C& c, B&) { c.out.slots = true; }},
  };
  cases.insert(cases.end(), ragged.begin(), ragged.end());
  for (const auto& test : cases) {
    expect_refused(test);
  }
}

TEST(Arguments, PagedSmoke) {
  using C = Call<PagedKeys>;
  using B = Buffers;
  auto cases = common_cases<PagedKeys>();
  const std::vector<Case<PagedKeys>> paged{
      {"cache", "data for 4", [](C& c, B&) { c.k.cache.data = nullptr; }},
      {"cache", "0 or more pages, got -1", [](C& c, B&) { c.k.cache.pages = -1; }},
      {"cache", "below 2^63", [](C& c, B&) { c.k.cache.pages = kHuge; }},
      {"cache", "D = 64 or 128, got 65", [](C& c, B&) { c.k.cache.dim = 65; }},
      {"cache", "D = 64 as q has, got 128", [](C& c, B&) { c.k.cache.dim = 128; }},
      {"cache", "at least 4352 bytes, a multiple of 4, got 4348",
       [](C& c, B&) { c.k.cache.page_stride = 4348; }},
      {"cache", "at least 4352 bytes, a multiple of 4, got 4354",
       [](C& c, B&) { c.k.cache.page_stride = 4354; }},
      {"cache", "at least 4352 bytes, a multiple of 4, got -4352",
       [](C& c, B&) { c.k.cache.page_stride = -4352; }},
      {"page_sums", "aligned to 4",
       [](C& c, B& b) { c.k.cache.page_sums = misaligned(b.k_scale.data()); }},
      {"cache", "page size of 32, 64 or 128, got 65", [](C& c, B&) { c.k.cache.page_size = 65; }},
      {"page_sums", "none for pages of 32 tokens",
       [](C& c, B& b) {
         c.k.cache.page_sums = b.k_scale.data();
         c.k.cache.page_size = 32;
       }},
      {"largest_scales", "none without page_sums",
       [](C& c, B& b) { c.k.cache.largest_scales = b.k_scale.data(); }},
      {"next_n", "1 with query_starts, got 2",
       [](C& c, B& b) { c.k.query_starts = b.query_starts; }},
      {"query_starts", "[0]: expected 0 to 0, ascending from 0 to T = 4, got 1",
       [](C& c, B& b) {
         b.query_starts[0] = 1, c.k.query_starts = b.query_starts, c.k.next_n = 1;
       }},
      {"query_starts", "[1]: expected 0 to 4, ascending from 0 to T = 4, got 5",
       [](C& c, B& b) {
         b.query_starts[1] = 5, c.k.query_starts = b.query_starts, c.k.next_n = 1;
       }},
      {"query_starts", "[2]: expected 3 to 4, ascending from 0 to T = 4, got 2",
       [](C& c, B& b) {
         b.query_starts[2] = 2, c.k.query_starts = b.query_starts, c.k.next_n = 1;
       }},
      {"query_starts", "[2]: expected T = 4, got 3",
       [](C& c, B& b) {
         b.query_starts[2] = 3, c.k.query_starts = b.query_starts, c.k.next_n = 1;
       }},
      {"query_starts", "aligned to 4",
       [](C& c, B& b) {
         c.k.query_starts = {misaligned(b.query_starts.data()), 3};
         c.k.next_n = 1;
       }},
      {"context_lens", "1 entries, one a sequence of query_starts, got 2",
       [](C& c, B& b) {
         c.k.query_starts = std::span(b.query_starts).first(2);
         c.k.next_n = 1;
       }},
      {"row_lens", "4 entries (T) or none, got 3",
       [](C& c, B& b) { c.k.row_lens = std::span(b.row_lens).first(3); }},
      {"row_lens", "aligned to 4",
       [](C& c, B& b) {
         c.k.row_lens = {misaligned(b.row_lens.data()), 4};
       }},
      {"row_lens", "[1]: expected at most max_pages * 64 = 128, got 129",
       [](C& c, B& b) { b.row_lens[1] = 129, c.k.row_lens = b.row_lens; }},
      {"block_table", "[1, 1]: expected a page from 0 to 3, got 1000",
       [](C& c, B& b) { b.row_lens[2] = 65, c.k.row_lens = b.row_lens; }},
      {"q", "batch * next_n = 1 * 3, got 4",
       [](C& c, B& b) { c.k.row_lens = b.row_lens, c.k.context_lens = {}, c.k.next_n = 3; }},
      {"next_n", "got 0", [](C& c, B&) { c.k.next_n = 0; }},
      {"next_n", "got -2", [](C& c, B&) { c.k.next_n = -2; }},
      {"next_n", "below 2^63", [](C& c, B&) { c.k.next_n = std::int64_t{1} << 62; }},
      {"q", "batch * next_n = 2 * 3, got 4", [](C& c, B&) { c.k.next_n = 3; }},
      {"q", "batch * next_n = 1 * 2, got 4",
       [](C& c, B&) { c.k.context_lens = c.k.context_lens.first(1); }},
      {"context_lens", "got null",
       [](C& c, B&) {
         c.k.context_lens = {static_cast<const std::int32_t*>(nullptr), 2};
       }},
      {"context_lens", "[1]: expected at most max_pages * 64 = 128, got 129",
       [](C&, B& b) { b.context_lens[1] = 129; }},
      {"block_table", "max_pages = 0 or more, got -1", [](C& c, B&) { c.k.max_pages = -1; }},
      {"block_table", "below 2^63",
       [](C& c, B&) { c.k.max_pages = kHuge, c.k.block_table_stride = kHuge; }},
      {"block_table", "data for 2", [](C& c, B&) { c.k.block_table = nullptr; }},
      {"block_table", "aligned to 4",
       [](C& c, B&) { c.k.block_table = misaligned(c.k.block_table); }},
      {"block_table", "row stride of at least 2, got 1",
       [](C& c, B&) { c.k.block_table_stride = 1; }},
      {"block_table", "row stride of at least 2, got -2",
       [](C& c, B&) { c.k.block_table_stride = -2; }},
      {"block_table", "[0, 1]: expected a page from 0 to 3, got 4",
       [](C&, B& b) { b.block_table[1] = 4; }},
      {"block_table", "[1, 0]: expected a page from 0 to 3, got -1",
       [](C&, B& b) { b.block_table[2] = -1; }},
      {"block_table", "[1, 1]: expected a page from 0 to 3, got 1000",
       [](C&, B& b) { b.context_lens[1] = 65; }},
      {"offsets", "none with slots, got 4 entries",
       [](C& c, B& b) { c.out.slots = true, c.out.offsets = b.row_lens; }},
      {"cache", "at most 2^31 slots to select them, got 2147483712",
       [](C& c, B&) { c.out.slots = true, c.k.cache.pages = (std::int64_t{1} << 25) + 1; }},
  };
  cases.insert(cases.end(), paged.begin(), paged.end());
  for (const auto& test : cases) {
    expect_refused(test);
  }
}

template <class Keys>
void expect_accepted(const std::function<void(Call<Keys>&, Buffers&)>& change) {
  Buffers buffers;
  Call<Keys> call(buffers);
  change(call, buffers);
  EXPECT_NO_THROW(call.run());
  EXPECT_THAT(buffers.indices, Each(Not(kPoisonIndex)));
}

// The unchanged call, and calls that differ little from refused ones.
TEST(Arguments, RightCallsAreAccepted) {
  expect_accepted<RaggedKeys>([](auto&, auto&) {});
  expect_accepted<PagedKeys>([](auto&, auto&) {});
  expect_accepted<RaggedKeys>([](auto&, Buffers& b) { b.ks[1] = 99; });  // ke < ks
  expect_accepted<RaggedKeys>([](auto&, Buffers& b) { b.ks[3] = 100; });
  expect_accepted<RaggedKeys>([](auto& c, auto&) { c.config.heads = 0, c.out.heads = {}; });
  expect_accepted<RaggedKeys>([](auto& c, auto&) { c.config.candidates = kTopK; });
  expect_accepted<RaggedKeys>(
      [](auto& c, auto&) { c.config.candidates = kTopK, c.config.sketch = 2; });
  expect_accepted<PagedKeys>(
      [](auto& c, auto&) { c.config.candidates = kTopK, c.config.sketch = 4; });
  expect_accepted<RaggedKeys>(
      [](auto& c, auto&) { c.config.dense_work = std::numeric_limits<std::int64_t>::max(); });
  expect_accepted<PagedKeys>([](auto&, Buffers& b) { b.context_lens = {-7, 0}; });
  expect_accepted<PagedKeys>(
      [](auto& c, Buffers& b) { c.k.query_starts = b.query_starts, c.k.next_n = 1; });
  expect_accepted<PagedKeys>([](auto& c, Buffers& b) { c.k.row_lens = b.row_lens; });
  expect_accepted<PagedKeys>(
      [](auto& c, Buffers& b) { c.k.row_lens = b.row_lens, c.k.context_lens = {}; });
  expect_accepted<PagedKeys>([](auto& c, Buffers& b) {  // row_lens count, not context_lens
    b.context_lens = {1000, 1000};
    c.k.row_lens = b.row_lens;
  });
  expect_accepted<PagedKeys>([](auto& c, Buffers& b) {
    c.k.cache.page_size = 32;
    b.context_lens = {64, 32};
  });
  expect_accepted<PagedKeys>([](auto& c, Buffers& b) {
    b.context_lens = {0, 0};
    c.k.block_table = nullptr;
    c.k.max_pages = 0;
  });
  expect_accepted<PagedKeys>(
      [](auto& c, auto&) { c.config.filter_block = 64, c.config.filter_blocks = 2; });
}

TEST(Arguments, FilterMayLeaveExactlyTopK) {
  EXPECT_NO_THROW(
      validate(IndexerConfig::hisa(65, 64, 2), {1, kHeads, kDim, 1000, DType::f32, DType::f32}));
}

TEST(Arguments, EmptyCallsAreRight) {
  const Context context({.backend = "reference", .threads = 1});
  const IndexerConfig config = IndexerConfig::dsa(3);
  const Queries none{nullptr, DType::f32, 0, kHeads, kDim};
  const Weights no_weights{nullptr, 0, kHeads};
  RaggedKeys no_keys;
  no_keys.dim = kDim;
  EXPECT_TRUE(select(context, config, none, no_weights, no_keys).indices.empty());
  PagedKeys no_pages;
  no_pages.cache.dim = kDim;
  EXPECT_TRUE(select(context, config, none, no_weights, no_pages).indices.empty());

  Buffers buffers;
  const Call<RaggedKeys> call(buffers);
  const std::vector<std::int32_t> zeros(kTokens);
  const Selected selected = select(context, config, call.q, call.w,
                                   {nullptr, DType::f32, 0, kDim, 0, nullptr, zeros, zeros});
  EXPECT_EQ(selected.indices, std::vector<std::int32_t>(kTokens * 3, -1));
}

// The stride of a dimension of fewer than two entries is never used, so any is accepted.
TEST(Arguments, StridesOfNothingDoNotMatter) {
  for (const std::int64_t stride : {std::int64_t{-7}, std::int64_t{1}, std::int64_t{3}, kHuge}) {
    SCOPED_TRACE(stride);
    const Context context({.backend = "reference", .threads = 1});
    const IndexerConfig config = IndexerConfig::dsa(3);
    RaggedKeys no_keys;
    no_keys.dim = kDim;
    no_keys.token_stride = stride;
    PagedKeys no_pages;
    no_pages.cache.dim = kDim;
    no_pages.cache.page_stride = stride;
    no_pages.block_table_stride = stride;
    no_pages.max_pages = 5;
    const Queries none{nullptr, DType::f32, 0, kHeads, kDim, stride, stride};
    const Weights no_weights{nullptr, 0, kHeads, stride};
    EXPECT_TRUE(select(context, config, none, no_weights, no_keys).indices.empty());
    EXPECT_TRUE(select(context, config, none, no_weights, no_pages).indices.empty());

    // One query of one head that sees one key, and one page.
    Buffers b;
    const std::vector<std::int32_t> zero{0};
    const std::vector<std::int32_t> one{1};
    const Queries q{b.q.data(), DType::f32, 1, 1, kDim, stride, stride};
    const Weights w{b.w.data(), 1, 1, stride};
    EXPECT_EQ(select(context, config, q, w,
                     RaggedKeys{b.q.data(), DType::f32, 1, kDim, stride, nullptr, zero, one})
                  .indices,
              (std::vector<std::int32_t>{0, -1, -1}));
    PagedKeys page{{b.cache.data(), 1, kDim, stride}, zero.data(), 1, stride, one};
    EXPECT_EQ(select(context, config, q, w, page).indices, (std::vector<std::int32_t>{0, -1, -1}));

    const std::vector<std::int64_t> skipped{-1};
    EXPECT_NO_THROW(append({nullptr, 0, kDim, stride}, {nullptr, DType::f32, 0, kDim, stride}, {}));
    EXPECT_NO_THROW(append({b.cache.data(), 1, kDim, stride},
                           {b.q.data(), DType::f32, 1, kDim, stride}, skipped));
    EXPECT_NO_THROW(copy_pages({nullptr, 0, kDim, stride}, {}, {nullptr, 0, kDim, stride}, {}));
    EXPECT_NO_THROW(gather({nullptr, 0, kDim, stride}, {}, 0, {}, {}));
  }
}

// The dense token stride is the head stride times the number of heads, even for one head.
TEST(Arguments, PaddedQueriesOfOneHead) {
  constexpr std::int64_t kPadded = kDim + 16;
  std::vector<float> q(kTokens * kPadded, std::numeric_limits<float>::quiet_NaN());
  for (std::int64_t t = 0; t < kTokens; ++t) {
    std::fill_n(&q[t * kPadded], kDim, static_cast<float>(t + 1));
  }
  Buffers b;
  std::fill(b.w.begin(), b.w.end(), 1.0F);
  const std::vector<float> k(kKeys * kDim, 1.0F);
  const RaggedKeys keys{k.data(), DType::f32, kKeys, kDim, 0, nullptr, b.ks, b.ke};
  const Weights w{b.w.data(), kTokens, 1};
  const Context context({.backend = "cpu", .threads = 1});
  const IndexerConfig config = IndexerConfig::dsa(1);
  Queries queries{q.data(), DType::f32, kTokens, 1, kDim, 0, kPadded};
  const Selected selected = select(context, config, queries, w, keys, {.scores = true});
  for (std::int64_t t = 0; t < kTokens; ++t) {
    EXPECT_EQ(selected.scores[t], static_cast<float>(kDim * (t + 1)));
  }
  queries.head_stride = 3;
  EXPECT_THROW(select(context, config, queries, w, keys), Error);
}

// Queries may lie head by head, [H, T, D].
TEST(Arguments, HeadMajorQueries) {
  Buffers b;
  for (std::size_t i = 0; i < b.q.size(); ++i) {
    b.q[i] = static_cast<float>(i % 13) - 6;
  }
  std::fill(b.w.begin(), b.w.end(), 1.0F);
  std::vector<float> head_major(b.q.size());
  for (std::int64_t t = 0; t < kTokens; ++t) {
    for (std::int64_t j = 0; j < kHeads; ++j) {
      std::copy_n(&b.q[(t * kHeads + j) * kDim], kDim, &head_major[(j * kTokens + t) * kDim]);
    }
  }
  std::vector<float> k(kKeys * kDim);
  for (std::size_t i = 0; i < k.size(); ++i) {
    k[i] = static_cast<float>(i % 7) - 3;
  }
  const RaggedKeys keys{k.data(), DType::f32, kKeys, kDim, 0, nullptr, b.ks, b.ke};
  const Weights w{b.w.data(), kTokens, kHeads};
  const Queries by_token{b.q.data(), DType::f32, kTokens, kHeads, kDim};
  const Queries by_head{head_major.data(), DType::f32, kTokens, kHeads, kDim, kDim, kTokens * kDim};
  for (const char* backend : {"reference", "cpu"}) {
    const Context context({.backend = backend, .threads = 1});
    const auto config = IndexerConfig::misa_r(kTopK, 2, 2 * kTopK);
    EXPECT_EQ(select(context, config, by_head, w, keys, {true, true, true}).scores,
              select(context, config, by_token, w, keys, {true, true, true}).scores);
  }
}

TEST(Arguments, SelectRefusesTheSame) {
  Buffers buffers;
  Call<RaggedKeys> call(buffers);
  call.k.dim = 128;
  EXPECT_THROW(select(Context(), call.config, call.q, call.w, call.k), Error);
  call.k.dim = kDim;
  call.config.top_k = 0;
  EXPECT_THROW(select(Context(), call.config, call.q, call.w, call.k), Error);
}

TEST(Arguments, Workspace) {
  alignas(kWorkspaceAlignment) std::byte memory[256];
  EXPECT_NO_THROW(validate_workspace(memory, 256));
  EXPECT_NO_THROW(validate_workspace({}, 0));
  const auto error_of = [&](std::span<const std::byte> workspace) {
    try {
      validate_workspace(workspace, 200);
    } catch (const Error& error) {
      return error;
    }
    return Error(ErrorCode::internal, "none was thrown");
  };
  EXPECT_EQ(error_of(std::span(memory).first(199)).code(), ErrorCode::workspace);
  EXPECT_STREQ(error_of(std::span(memory).first(199)).what(),
               "workspace: expected 200 bytes, got 199");
  EXPECT_EQ(error_of(std::span(memory).subspan(8)).code(), ErrorCode::invalid_argument);
  EXPECT_THAT(error_of(std::span(memory).subspan(8)).what(), HasSubstr("aligned to 64 bytes"));
}

}  // namespace
}  // namespace misa
