// SPDX-License-Identifier: Apache-2.0
// The paged key cache: quantising, appending, copying, gathering, and the page sums beside it.
#include "misa/cache.hpp"

#include <gmock/gmock.h>

#include <algorithm>
#include <bit>
#include <cfenv>
#include <cmath>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <tuple>
#include <vector>

#include "misa/error.hpp"
#include "support/float_mode.hpp"

namespace misa {
namespace {

using ::testing::AnyOf;
using ::testing::Each;
using ::testing::HasSubstr;
using ::testing::Not;
using ::testing::StartsWith;

constexpr std::uint8_t kPoison = 0xa5;
constexpr float kPoisonSum = -12345.0F;

std::vector<float> random_keys(std::int64_t count, std::int64_t dim, unsigned seed) {
  std::mt19937 random(seed);
  std::normal_distribution<float> normal;
  std::vector<float> keys(static_cast<std::size_t>(count * dim));
  std::generate(keys.begin(), keys.end(), [&] { return normal(random); });
  return keys;
}

// A cache that owns its bytes, padding included; bytes that are not written keep the poison value.
struct Cache {
  std::int64_t pages;
  std::int64_t dim;
  std::int64_t stride;
  std::vector<std::uint8_t> data;
  std::vector<float> sums;

  explicit Cache(std::int64_t page_count, std::int64_t size = 64, std::int64_t padding = 0)
      : pages(page_count),
        dim(size),
        stride(64 * (size + 4) + padding),
        data(static_cast<std::size_t>(pages * stride), kPoison),
        sums(static_cast<std::size_t>(pages * dim), kPoisonSum) {}

  [[nodiscard]] CacheSpan span() { return {data.data(), pages, dim, stride, sums.data()}; }
  [[nodiscard]] CacheView view() const { return {data.data(), pages, dim, stride, sums.data()}; }

  // Reads by the layout in the public header.
  [[nodiscard]] float scale(std::int64_t slot) const {
    float value = 0;
    std::memcpy(&value, &data[slot / 64 * stride + 64 * dim + slot % 64 * 4], sizeof value);
    return value;
  }
  [[nodiscard]] float key(std::int64_t slot, std::int64_t d) const {
    return scale(slot) * e4m3_to_float(data[slot / 64 * stride + slot % 64 * dim + d]);
  }

  // The first tokens of a page, in order.
  [[nodiscard]] std::vector<float> sum_of(std::int64_t page, std::int64_t tokens) const {
    std::vector<float> sum(static_cast<std::size_t>(dim));
    for (std::int64_t i = 0; i < tokens; ++i) {
      for (std::int64_t d = 0; d < dim; ++d) {
        sum[d] += key(page * 64 + i, d);
      }
    }
    return sum;
  }
  [[nodiscard]] std::vector<float> sidecar(std::int64_t page) const {
    return {sums.begin() + page * dim, sums.begin() + (page + 1) * dim};
  }
};

std::vector<std::int64_t> range(std::int64_t first, std::int64_t last) {
  std::vector<std::int64_t> slots;
  for (std::int64_t slot = first; slot < last; ++slot) {
    slots.push_back(slot);
  }
  return slots;
}

void append(Cache& cache, const std::vector<std::int64_t>& slots, unsigned seed = 1,
            ScaleFormat format = ScaleFormat::f32) {
  const auto tokens = std::ssize(slots);
  const std::vector<float> keys = random_keys(tokens, cache.dim, seed);
  append(cache.span(), {keys.data(), DType::f32, tokens, cache.dim, 0}, slots, format);
}

TEST(Quantize, ErrorIsWithinHalfAStep) {
  for (const ScaleFormat format : {ScaleFormat::f32, ScaleFormat::ue8m0}) {
    const std::vector<float> key = random_keys(1, 128, 7);
    std::vector<std::uint8_t> bytes(key.size());
    const float scale = quantize(key, format, bytes);
    for (std::size_t d = 0; d < key.size(); ++d) {
      // e4m3 has three mantissa bits: half a step is 2^-4 of the value, or 2^-10 of the scale
      // where it is subnormal. The two fp32 roundings (of value / scale, and of the scale itself
      // where the largest value becomes 448) add 2^-23 of the value at most.
      const float step = std::max(std::abs(key[d]) * (0x1p-4F + 0x1p-22F), scale * 0x1p-10F);
      EXPECT_NEAR(scale * e4m3_to_float(bytes[d]), key[d], step);
    }
  }
}

// What is written does not depend on the caller's floating-point mode, and the mode is restored.
TEST(Cache, FloatingPointModeOfTheCaller) {
  constexpr std::int64_t kCount = 70;
  std::vector<float> keys = random_keys(kCount, 64, 7);
  for (float& value : keys) {
    value *= 0x1p-120F;  // below what a scale can resolve, and subnormal in part
  }
  std::copy_n(random_keys(kCount / 2, 64, 8).begin(), kCount / 2 * 64, keys.begin());
  const std::vector<std::int64_t> slots = range(0, kCount);
  const auto written = [&](ScaleFormat format) {
    std::vector<std::uint8_t> data(2 * 64 * (64 + 4));
    std::vector<float> sums(2 * 64);
    const CacheSpan cache{data.data(), 2, 64, 0, sums.data()};
    append(cache, {keys.data(), DType::f32, kCount, 64}, slots, format);
    const std::vector<float> appended = sums;
    rebuild(cache, std::vector<std::int32_t>{0, 1}, std::vector<std::int32_t>{64, 6});
    return std::tuple(data, appended, sums);
  };
  for (const ScaleFormat format : {ScaleFormat::f32, ScaleFormat::ue8m0}) {
    const auto expected = written(format);
    const test::OtherFloatMode mode;
    EXPECT_EQ(written(format), expected);
    EXPECT_EQ(std::fegetround(), FE_TOWARDZERO);
  }
}

TEST(Quantize, ScaleIsTheLargestOver448) {
  std::vector<float> key(64, 1.0F);
  std::vector<std::uint8_t> bytes(64);
  key[9] = -3.5F;
  EXPECT_EQ(quantize(key, ScaleFormat::f32, bytes), 3.5F / 448.0F);
  EXPECT_EQ(e4m3_to_float(bytes[9]), -448.0F);
  key.assign(64, 0.0F);
  EXPECT_EQ(quantize(key, ScaleFormat::f32, bytes), 1e-4F / 448.0F);
  EXPECT_THAT(bytes, Each(0));
}

TEST(Quantize, PowersOfTwoNeverClip) {
  std::vector<std::uint8_t> bytes(64);
  std::vector<float> key(64);
  // Values near every power of two, and values for which max / 448 is a power of two.
  for (int exponent = -20; exponent < 120; ++exponent) {
    for (const float mantissa : {1.0F, 1.75F, std::nextafter(1.75F, 0.0F),
                                 std::nextafter(1.75F, 2.0F), std::nextafter(2.0F, 0.0F)}) {
      key[3] = std::ldexp(mantissa, exponent);
      const float scale = quantize(key, ScaleFormat::ue8m0, bytes);
      const float exact = std::max(key[3], 1e-4F) / 448.0F;
      EXPECT_EQ(std::bit_cast<std::uint32_t>(scale) & 0x7fffffU, 0U) << scale;
      EXPECT_GE(scale, exact);
      EXPECT_LT(scale, 2 * exact);
      EXPECT_LE(key[3] / scale, kE4m3Max);
    }
  }
}

TEST(Quantize, NonFiniteValuesStayWithTheirKey) {
  constexpr float kInf = std::numeric_limits<float>::infinity();
  std::vector<std::uint8_t> bytes(64);
  std::vector<float> key(64, 2.0F);
  key[5] = std::numeric_limits<float>::quiet_NaN();
  EXPECT_EQ(quantize(key, ScaleFormat::f32, bytes), 2.0F / 448.0F);
  EXPECT_TRUE(std::isnan(e4m3_to_float(bytes[5])));
  EXPECT_EQ(e4m3_to_float(bytes[4]), 448.0F);
  key[5] = -kInf;
  for (const ScaleFormat format : {ScaleFormat::f32, ScaleFormat::ue8m0}) {
    EXPECT_EQ(quantize(key, format, bytes), kInf);
    EXPECT_EQ(e4m3_to_float(bytes[4]), 0.0F);
  }
}

TEST(Cache, AppendWritesTheLayoutAndNothingElse) {
  for (const std::int64_t dim : {64, 128}) {
    Cache cache(3, dim, 20);
    const std::vector<float> keys = random_keys(2, dim, 3);
    append(cache.span(), {keys.data(), DType::f32, 2, dim, 0}, std::vector<std::int64_t>{130, 64});
    Cache expected(3, dim, 20);
    for (const auto& [slot, i] : {std::pair{130, 0}, std::pair{64, 1}}) {
      std::uint8_t* page = expected.data.data() + slot / 64 * expected.stride;
      const float scale = quantize(std::span(keys).subspan(i * dim, dim), ScaleFormat::f32,
                                   {page + slot % 64 * dim, static_cast<std::size_t>(dim)});
      std::memcpy(page + 64 * dim + slot % 64 * 4, &scale, sizeof scale);
    }
    EXPECT_EQ(cache.data, expected.data);
    EXPECT_EQ(cache.sidecar(0), expected.sidecar(0));
  }
}

TEST(Cache, AppendReadsStridedKeysOfBothTypes) {
  const std::vector<float> wide = random_keys(3, 80, 5);
  std::vector<std::uint16_t> half(wide.size());
  std::transform(wide.begin(), wide.end(), half.begin(), float_to_bf16);
  std::vector<float> dense;
  std::vector<float> dense_half;
  for (int i = 0; i < 3; ++i) {
    for (int d = 0; d < 64; ++d) {
      dense.push_back(wide[i * 80 + d]);
      dense_half.push_back(bf16_to_float(half[i * 80 + d]));
    }
  }
  const std::vector<std::int64_t> slots{0, -1, 1};
  const auto cache_of = [&](const NewKeys& keys) {
    Cache cache(1);
    append(cache.span(), keys, slots);
    return cache;
  };
  const Cache expected = cache_of({dense.data(), DType::f32, 3, 64, 0});
  const Cache expected_half = cache_of({dense_half.data(), DType::f32, 3, 64, 0});
  EXPECT_EQ(cache_of({wide.data(), DType::f32, 3, 64, 80}).data, expected.data);
  EXPECT_EQ(cache_of({half.data(), DType::bf16, 3, 64, 80}).data, expected_half.data);
  EXPECT_NE(expected.data, expected_half.data);
  EXPECT_EQ(expected.data[2 * 64], kPoison);  // the skipped key left no gap
}

TEST(Cache, PowerOfTwoScalesAreStored) {
  Cache cache(1);
  append(cache, range(0, 10), 1, ScaleFormat::ue8m0);
  for (std::int64_t slot = 0; slot < 10; ++slot) {
    EXPECT_EQ(std::bit_cast<std::uint32_t>(cache.scale(slot)) & 0x7fffffU, 0U);
  }
}

TEST(PageSums, FollowAppendsOfAnySize) {
  Cache whole(3, 128, 4);
  append(whole, range(0, 150));
  EXPECT_EQ(whole.sidecar(0), whole.sum_of(0, 64));
  EXPECT_EQ(whole.sidecar(1), whole.sum_of(1, 64));
  EXPECT_EQ(whole.sidecar(2), whole.sum_of(2, 150 - 128));

  // Appended one by one, the same keys give the same bits after every key.
  Cache single(3, 128, 4);
  const std::vector<float> keys = random_keys(150, 128, 1);
  for (std::int64_t slot = 0; slot < 150; ++slot) {
    append(single.span(), {keys.data() + slot * 128, DType::f32, 1, 128, 0}, range(slot, slot + 1));
    ASSERT_EQ(single.sidecar(slot / 64), single.sum_of(slot / 64, slot % 64 + 1));
  }
  EXPECT_EQ(single.sums, whole.sums);
}

TEST(PageSums, ReusedPagesForgetTheirFormerContent) {
  Cache cache(2);
  append(cache, range(0, 64), 1);
  append(cache, range(0, 3), 2);  // another sequence takes the page
  EXPECT_EQ(cache.sidecar(0), cache.sum_of(0, 3));
}

TEST(PageSums, FollowRollback) {
  Cache cache(1);
  append(cache, range(0, 20), 1);
  append(cache, range(15, 17), 2);  // five speculated tokens were refused, two came instead
  EXPECT_EQ(cache.sidecar(0), cache.sum_of(0, 17));
}

TEST(PageSums, DoNotDependOnTheOrderOfSlots) {
  Cache cache(2);
  std::vector<std::int64_t> slots{5, 70, -1, 3, 1, 64, 0, 2, 4, 69, 65, 66, 67, 68};
  append(cache, slots);
  EXPECT_EQ(cache.sidecar(0), cache.sum_of(0, 6));
  EXPECT_EQ(cache.sidecar(1), cache.sum_of(1, 7));
}

TEST(PageSums, AreOptional) {
  Cache cache(1);
  CacheSpan span = cache.span();
  span.page_sums = nullptr;
  const std::vector<float> keys = random_keys(1, 64, 1);
  append(span, {keys.data(), DType::f32, 1, 64, 0}, range(0, 1));
  EXPECT_THAT(cache.sums, Each(kPoisonSum));
  EXPECT_NE(cache.data[0], kPoison);
}

TEST(PageSums, RebuildEqualsAppendBitForBit) {
  Cache cache(3, 64, 8);
  append(cache, range(0, 100));
  const std::vector<float> appended = cache.sums;
  cache.sums.assign(cache.sums.size(), kPoisonSum);
  rebuild(cache.span(), std::vector<std::int32_t>{1, 0}, std::vector<std::int32_t>{100 - 64, 64});
  EXPECT_EQ(cache.sums, appended);
  cache.sums.assign(cache.sums.size(), kPoisonSum);
  rebuild(cache.span(), std::vector<std::int32_t>{0});
  EXPECT_EQ(cache.sidecar(0), std::vector<float>(appended.begin(), appended.begin() + 64));
  EXPECT_THAT(cache.sidecar(1), Each(kPoisonSum));
}

TEST(Cache, CopiesPagesWithTheirSums) {
  Cache source(3, 64, 4);
  append(source, range(0, 192));
  Cache target(4, 64, 12);
  copy_pages(source.view(), std::vector<std::int32_t>{2, 0, 2}, target.span(),
             std::vector<std::int32_t>{1, 3, 0});
  for (const auto& [from, to] : {std::pair{2, 1}, std::pair{0, 3}, std::pair{2, 0}}) {
    EXPECT_EQ(target.sidecar(to), source.sidecar(from));
    EXPECT_EQ(target.sum_of(to, 64), source.sum_of(from, 64));
    EXPECT_EQ(target.data[to * target.stride + 64 * 68], kPoison);  // padding is not copied
  }
  EXPECT_THAT(target.sidecar(2), Each(kPoisonSum));
}

TEST(Cache, CopyOnWriteLeavesTheSharedPageAlone) {
  Cache cache(2);
  append(cache, range(0, 40), 1);
  const std::vector<float> shared = cache.sidecar(0);
  copy_pages(cache.view(), std::vector<std::int32_t>{0}, cache.span(),
             std::vector<std::int32_t>{1});
  append(cache, range(64 + 40, 64 + 41), 2);
  EXPECT_EQ(cache.sidecar(0), shared);
  EXPECT_EQ(cache.sidecar(1), cache.sum_of(1, 41));
}

TEST(Cache, GathersInTheOrderOfTheBlockTable) {
  Cache cache(4, 128, 4);
  append(cache, range(0, 256));
  const std::vector<std::int32_t> block_table{3, 1, 99};  // an entry that is not used
  for (const std::int64_t tokens : {0, 1, 64, 65, 128}) {
    std::vector<std::uint8_t> k(static_cast<std::size_t>(tokens * 128));
    std::vector<float> scale(static_cast<std::size_t>(tokens));
    gather(cache.view(), block_table, tokens, k, scale);
    for (std::int64_t i = 0; i < tokens; ++i) {
      const std::int64_t slot = block_table[i / 64] * 64 + i % 64;
      ASSERT_EQ(scale[i], cache.scale(slot));
      ASSERT_EQ(scale[i] * e4m3_to_float(k[i * 128 + 127]), cache.key(slot, 127));
      ASSERT_EQ(scale[i] * e4m3_to_float(k[i * 128]), cache.key(slot, 0));
    }
  }
}

TEST(Cache, BytesOfACache) {
  EXPECT_EQ(cache_bytes(3, 128), 3 * 64 * 132);
  EXPECT_EQ(cache_bytes(0, 64), 0);
}

// Every wrong argument is refused with a message that names it, and nothing is written.
struct BadCall {
  std::string argument;
  std::string expected;  // part of the message
  std::function<void(Cache&)> call;
};

TEST(Cache, WrongArgumentsSmoke) {
  static const std::vector<float> keys = random_keys(2, 64, 1);
  static const std::vector<std::int64_t> two{0, 1};
  const auto with = [](auto member, auto value) {
    return [=](Cache& cache) {
      CacheSpan span = cache.span();
      span.*member = value;
      append(span, {keys.data(), DType::f32, 2, 64, 0}, two);
    };
  };
  const auto with_keys = [](auto member, auto value) {
    return [=](Cache& cache) {
      NewKeys k{keys.data(), DType::f32, 2, 64, 0};
      k.*member = value;
      append(cache.span(), k, two);
    };
  };
  const auto with_slots = [](std::vector<std::int64_t> slots) {
    return [=](Cache& cache) { append(cache.span(), {keys.data(), DType::f32, 2, 64, 0}, slots); };
  };
  using Pages = std::vector<std::int32_t>;
  const auto copy = [](const Pages& from, const Pages& to) {
    return [=](Cache& cache) { copy_pages(cache.view(), from, cache.span(), to); };
  };
  const auto rebuilding = [](const Pages& pages, const Pages& filled) {
    return [=](Cache& cache) { rebuild(cache.span(), pages, filled); };
  };
  const auto gathering = [](const Pages& table, std::int64_t tokens, std::size_t bytes,
                            std::size_t scales) {
    return [=](Cache& cache) {
      std::vector<std::uint8_t> k(bytes);
      std::vector<float> scale(scales);
      gather(cache.view(), table, tokens, k, scale);
    };
  };
  const auto* odd = reinterpret_cast<const float*>(reinterpret_cast<const char*>(keys.data()) + 1);
  const std::int64_t huge = std::int64_t{1} << 60;

  const std::vector<BadCall> calls{
      {"cache", "D = 64 or 128, got 32", with(&CacheSpan::dim, 32)},
      {"cache", "0 or more pages, got -1", with(&CacheSpan::pages, -1)},
      {"cache", "below 2^63", with(&CacheSpan::pages, huge)},
      {"cache", "got null", with(&CacheSpan::data, nullptr)},
      {"cache", "got 4348", with(&CacheSpan::page_stride, 4348)},
      {"cache", "multiple of 4, got 4353", with(&CacheSpan::page_stride, 4353)},
      {"page_sums", "aligned to 4", with(&CacheSpan::page_sums, const_cast<float*>(odd))},
      {"k", "f32 or bf16, got dtype 2", with_keys(&NewKeys::dtype, DType::e4m3)},
      {"k", "D = 64 as the cache has, got 128", with_keys(&NewKeys::dim, 128)},
      {"k", "0 or more tokens, got -2", with_keys(&NewKeys::tokens, -2)},
      {"k", "token stride of at least 64, got 63", with_keys(&NewKeys::token_stride, 63)},
      {"k", "token stride of at least 64, got -64", with_keys(&NewKeys::token_stride, -64)},
      {"k", "below 2^63", with_keys(&NewKeys::token_stride, 7 * huge)},
      {"k", "got null", with_keys(&NewKeys::data, nullptr)},
      {"k", "aligned to 4", with_keys(&NewKeys::data, odd)},
      {"slots", "2, one a key, got 1", with_slots({0})},
      {"slots", "each at most once, got 5 twice", with_slots({5, 5})},
      {"slots", "[1]: expected -1 to 191, got 192", with_slots({0, 192})},
      {"slots", "[0]: expected -1 to 191, got -2", with_slots({-2, 0})},
      {"scale format", "f32 or ue8m0, got 2",
       [](Cache& cache) {
         append(cache.span(), {keys.data(), DType::f32, 2, 64, 0}, two,
                static_cast<ScaleFormat>(2));
       }},
      {"to", "2 pages, one a page of from, got 1", copy({0, 1}, {2})},
      {"from", "[0]: expected a page from 0 to 2, got 3", copy({3}, {0})},
      {"to", "[0]: expected a page from 0 to 2, got -1", copy({0}, {-1})},
      {"to", "each at most once, got 2 twice", copy({0, 1}, {2, 2})},
      {"from", "[1]: expected a page that is not overwritten, got 1", copy({0, 1}, {1, 2})},
      {"target", "D = 64 as the source has, got 128",
       [](Cache& cache) {
         Cache other(1, 128);
         copy_pages(cache.view(), Pages{0}, other.span(), Pages{0});
       }},
      {"source", "page sums",
       [](Cache& cache) {
         CacheView view = cache.view();
         view.page_sums = nullptr;
         copy_pages(view, Pages{0}, cache.span(), Pages{1});
       }},
      {"pages", "[0]: expected a page from 0 to 2, got 7", rebuilding({7}, {})},
      {"filled", "none or 2, one a page, got 1", rebuilding({0, 1}, {64})},
      {"filled", "[1]: expected 0 to 64, got 65", rebuilding({0, 1}, {64, 65})},
      {"filled", "[0]: expected 0 to 64, got -1", rebuilding({0}, {-1})},
      {"page_sums", "got null",
       [](Cache& cache) {
         CacheSpan span = cache.span();
         span.page_sums = nullptr;
         rebuild(span, Pages{0});
       }},
      {"tokens", "0 or more, got -1", gathering({0}, -1, 0, 0)},
      {"block_table", "2 pages for 65 tokens, got 1", gathering({0}, 65, 65 * 64, 65)},
      {"block_table", "[1]: expected a page from 0 to 2, got 3",
       gathering({0, 3}, 65, 65 * 64, 65)},
      {"k", "2 * 64 bytes, got 127", gathering({0}, 2, 127, 2)},
      {"scale", "expected 2, got 1", gathering({0}, 2, 128, 1)},
      {"out", "64 bytes, got 63",
       [](Cache& cache) {
         quantize(std::span(keys).first(64), ScaleFormat::f32, std::span(cache.data).first(63));
       }},
      {"pages", "0 or more, got -1", [](Cache&) { cache_bytes(-1, 64); }},
      {"pages", "below 2^63", [=](Cache&) { cache_bytes(huge, 64); }},
      {"dim", "64 or 128, got 1", [](Cache&) { cache_bytes(1, 1); }},
  };
  for (const BadCall& bad : calls) {
    SCOPED_TRACE(bad.argument + ": … " + bad.expected);
    Cache cache(3);
    try {
      bad.call(cache);
      ADD_FAILURE() << "expected an error";
    } catch (const Error& error) {
      const std::string message = error.what();
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
      EXPECT_THAT(message,
                  AnyOf(StartsWith(bad.argument + ": expected "), StartsWith(bad.argument + "[")));
      EXPECT_THAT(message, HasSubstr(bad.expected));
      EXPECT_THAT(message, HasSubstr(", got "));
      EXPECT_THAT(message, Not(HasSubstr("\n")));
    }
    EXPECT_THAT(cache.data, Each(kPoison));
    EXPECT_THAT(cache.sums, Each(kPoisonSum));
  }
}

}  // namespace
}  // namespace misa
