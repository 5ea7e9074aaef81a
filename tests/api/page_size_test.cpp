// SPDX-License-Identifier: Apache-2.0
// Pages of every size, with their derived data in arrays or in their tails: whatever is done to a
// cache, slot s holds what it holds in pages of 64 tokens, and group s / 64 has its sum.
#include <gmock/gmock.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "core/sketch.hpp"
#include "misa/cache.hpp"
#include "misa/error.hpp"

namespace misa {
namespace {

using ::testing::HasSubstr;

constexpr std::uint8_t kPoison = 0xa5;
constexpr std::int64_t kTokens = 512;

struct Layout {
  std::int64_t page_size;
  std::int64_t padding;  // of every stride, in units of 4 bytes
  bool tail;
};

class AnyCache {
 public:
  AnyCache(std::int64_t dim, const Layout& layout) : layout_(layout) {
    const std::int64_t pages = kTokens / layout.page_size;
    const std::int64_t dense = layout.page_size * (dim + 4);
    const std::int64_t groups = layout.page_size / kGroupSize;
    const std::int64_t stride =
        (layout.tail ? page_tail(dim, layout.page_size, 4).page_stride : dense) +
        4 * layout.padding;
    data_.assign(static_cast<std::size_t>(pages * stride), kPoison);
    span_ = {data_.data(), pages, dim, stride, nullptr, layout.page_size};
    if (layout.tail) {
      span_ = with_tail(span_);
    } else if (groups > 0) {
      span_.page_sums_stride = groups * dim + layout.padding;
      span_.largest_scales_stride = groups + layout.padding;
      sums_.assign(static_cast<std::size_t>(pages * span_.page_sums_stride), -1.0F);
      largest_.assign(static_cast<std::size_t>(pages * span_.largest_scales_stride), -1.0F);
      span_.page_sums = sums_.data();
      span_.largest_scales = largest_.data();
    }
  }

  [[nodiscard]] const CacheSpan& span() const { return span_; }
  [[nodiscard]] CacheView view() const {
    return {span_.data,
            span_.pages,
            span_.dim,
            span_.page_stride,
            span_.page_sums,
            span_.page_size,
            span_.page_sums_stride,
            span_.largest_scales,
            span_.largest_scales_stride};
  }
  [[nodiscard]] bool has_sums() const { return span_.page_sums != nullptr; }

  // The bytes of a key and of its scale.
  [[nodiscard]] std::vector<std::uint8_t> key(std::int64_t slot) const {
    const std::uint8_t* page = span_.data + slot / span_.page_size * span_.page_stride;
    const std::int64_t token = slot % span_.page_size;
    std::vector<std::uint8_t> bytes(page + token * span_.dim, page + (token + 1) * span_.dim);
    const std::uint8_t* scale = page + span_.page_size * span_.dim + 4 * token;
    bytes.insert(bytes.end(), scale, scale + 4);
    return bytes;
  }
  [[nodiscard]] float scale(std::int64_t slot) const {
    float value = 0;
    std::memcpy(&value, key(slot).data() + span_.dim, sizeof value);
    return value;
  }
  // The sum of a group, then its largest scale.
  [[nodiscard]] std::vector<float> group(std::int64_t number) const {
    const std::int64_t groups = span_.page_size / kGroupSize;
    const float* sum =
        span_.page_sums + number / groups * span_.page_sums_stride + number % groups * span_.dim;
    std::vector<float> values(sum, sum + span_.dim);
    values.push_back(
        span_.largest_scales[number / groups * span_.largest_scales_stride + number % groups]);
    return values;
  }

  // Calls rebuild or copy for 128-token stretches, which every page size divides.
  [[nodiscard]] std::vector<std::int32_t> pages_of(std::int64_t stretch) const {
    std::vector<std::int32_t> pages;
    const std::int64_t each = 128 / span_.page_size;
    for (std::int64_t i = 0; i < each; ++i) {
      pages.push_back(static_cast<std::int32_t>(stretch * each + i));
    }
    return pages;
  }

  // Bytes of the page stride that belong to nothing still have the poison value.
  void expect_padding_untouched() const {
    const std::int64_t dense = span_.page_size * (span_.dim + 4);
    for (std::int64_t page = 0; page < span_.pages; ++page) {
      const std::uint8_t* at = span_.data + page * span_.page_stride;
      std::int64_t first = dense;
      if (layout_.tail) {
        const PageTail tail = page_tail(span_.dim, span_.page_size);
        EXPECT_TRUE(std::all_of(at + dense, at + tail.page_sums, is_poison));
        first = tail.sketch;
      }
      EXPECT_TRUE(std::all_of(at + first, at + span_.page_stride, is_poison)) << page;
    }
  }

 private:
  static bool is_poison(std::uint8_t byte) { return byte == kPoison; }

  Layout layout_;
  std::vector<std::uint8_t> data_;
  std::vector<float> sums_;
  std::vector<float> largest_;
  CacheSpan span_;
};

std::vector<std::uint32_t> bits(const std::vector<float>& values) {
  std::vector<std::uint32_t> out;
  for (const float value : values) {
    out.push_back(std::bit_cast<std::uint32_t>(value));
  }
  return out;
}

void expect_equal(const AnyCache& cache, const AnyCache& wanted) {
  for (std::int64_t slot = 0; slot < kTokens; ++slot) {
    ASSERT_EQ(cache.key(slot), wanted.key(slot)) << slot;
  }
  for (std::int64_t group = 0; cache.has_sums() && group < kTokens / kGroupSize; ++group) {
    ASSERT_EQ(bits(cache.group(group)), bits(wanted.group(group))) << group;
  }
  cache.expect_padding_untouched();
}

std::vector<std::int64_t> random_slots(std::mt19937& random) {
  std::vector<std::int64_t> slots(kTokens);
  for (std::int64_t i = 0; i < kTokens; ++i) {
    slots[i] = i;
  }
  std::shuffle(slots.begin(), slots.end(), random);
  slots.resize(1 + random() % 20);
  if (random() % 2 == 0) {
    slots.front() = -1;
  }
  return slots;
}

TEST(PageSizes, EveryOperationEqualsPagesOf64) {
  for (const std::int64_t dim : {64, 128}) {
    std::vector<AnyCache> caches;
    for (const std::int64_t page_size : {64, 32, 128}) {
      for (const auto& [padding, tail] :
           {std::pair{std::int64_t{0}, false}, std::pair{std::int64_t{3}, false},
            std::pair{std::int64_t{0}, true}, std::pair{std::int64_t{32}, true}}) {
        caches.emplace_back(dim, Layout{page_size, padding, tail});
      }
    }
    std::mt19937 random(3);
    std::normal_distribution<float> normal;
    const auto everywhere = [&](const std::function<void(const AnyCache&)>& act) {
      for (const AnyCache& cache : caches) {
        act(cache);
      }
    };
    // Every group gets a sum first.
    everywhere([](const AnyCache& cache) {
      std::vector<std::int32_t> all(static_cast<std::size_t>(cache.span().pages));
      for (std::size_t i = 0; i < all.size(); ++i) {
        all[i] = static_cast<std::int32_t>(i);
      }
      if (cache.has_sums()) {
        rebuild(cache.span(), all);
      }
    });
    for (int step = 0; step < 60; ++step) {
      const auto slots = random_slots(random);
      std::vector<float> keys(slots.size() * static_cast<std::size_t>(dim));
      std::generate(keys.begin(), keys.end(), [&] { return normal(random); });
      if (step % 7 == 6) {
        keys.front() = std::numeric_limits<float>::quiet_NaN();
        keys.back() = -std::numeric_limits<float>::infinity();
      }
      const ScaleFormat format = step % 2 == 0 ? ScaleFormat::f32 : ScaleFormat::ue8m0;
      const auto from = static_cast<std::int64_t>(random() % 4);
      const auto to = (from + 1 + static_cast<std::int64_t>(random() % 3)) % 4;
      const auto filled = static_cast<std::int32_t>(random() % 129);
      everywhere([&](const AnyCache& cache) {
        const NewKeys k{keys.data(), DType::f32, std::ssize(slots), dim};
        if (step % 3 == 2 && &cache != &caches.front()) {  // bytes first, then what is derived
          CacheSpan bytes = cache.span();
          bytes.page_sums = bytes.largest_scales = nullptr;
          append(bytes, k, slots, format);
          append(cache.span(), slots);
        } else {
          append(cache.span(), k, slots, format);
        }
        if (step % 5 == 4) {
          copy_pages(cache.view(), cache.pages_of(from), cache.span(), cache.pages_of(to));
        }
        if (step % 9 == 8 && cache.has_sums()) {
          const auto pages = cache.pages_of(to);
          std::vector<std::int32_t> counts;
          for (std::size_t i = 0; i < pages.size(); ++i) {
            const auto size = static_cast<std::int32_t>(cache.span().page_size);
            counts.push_back(std::clamp(filled - static_cast<std::int32_t>(i) * size, 0, size));
          }
          rebuild(cache.span(), pages, counts);
        }
      });
      everywhere([&](const AnyCache& cache) { expect_equal(cache, caches.front()); });
    }
  }
}

TEST(PageSizes, GatherReadsSlotsInOrder) {
  for (const std::int64_t page_size : {32, 64, 128}) {
    const AnyCache cache(64, {page_size, 1, false});
    std::vector<float> keys(kTokens * 64);
    std::mt19937 random(5);
    std::normal_distribution<float> normal;
    std::generate(keys.begin(), keys.end(), [&] { return normal(random); });
    std::vector<std::int64_t> slots(kTokens);
    std::vector<std::int32_t> table;
    for (std::int64_t i = 0; i < kTokens; ++i) {
      slots[i] = kTokens - 1 - i;
    }
    for (std::int64_t page = cache.span().pages; page-- > 0;) {
      table.push_back(static_cast<std::int32_t>(page));
    }
    append(cache.span(), {keys.data(), DType::f32, kTokens, 64}, slots);
    for (const std::int64_t tokens : {0, 1, 31, 32, 64, 129, 512}) {
      std::vector<std::uint8_t> k(static_cast<std::size_t>(tokens * 64));
      std::vector<float> scale(static_cast<std::size_t>(tokens));
      gather(cache.view(), table, tokens, k, scale);
      for (std::int64_t i = 0; i < tokens; ++i) {
        const std::int64_t slot = table[i / page_size] * page_size + i % page_size;
        const auto wanted = cache.key(slot);
        ASSERT_TRUE(std::equal(k.begin() + i * 64, k.begin() + (i + 1) * 64, wanted.begin()));
        ASSERT_EQ(scale[i], cache.scale(slot));
      }
    }
  }
}

TEST(PageSizes, LargestScaleIsThatOfTheTokensThatCount) {
  const AnyCache cache(64, {128, 0, false});
  std::vector<float> keys(128 * 64, 1.0F);
  std::vector<std::int64_t> slots(128);
  for (std::int64_t i = 0; i < 128; ++i) {
    slots[i] = i;
    keys[i * 64] = static_cast<float>(i + 2);
  }
  append(cache.span(), {keys.data(), DType::f32, 128, 64}, slots);
  EXPECT_EQ(cache.group(0).back(), cache.scale(63));
  EXPECT_EQ(cache.group(1).back(), cache.scale(127));
  const std::vector<std::int64_t> earlier{70};
  append(cache.span(), {keys.data(), DType::f32, 1, 64}, earlier);
  EXPECT_EQ(cache.group(0).back(), cache.scale(63));
  EXPECT_EQ(cache.group(1).back(), cache.scale(69));  // slot 70 got a smaller key

  // The scales of an engine may have any bits: the sign does not count, and NaN is the largest.
  const auto set_scale = [&](std::int64_t slot, float scale) {
    std::memcpy(cache.span().data + 128 * 64 + 4 * slot, &scale, sizeof scale);
    rebuild(cache.span(), std::vector<std::int32_t>{0});
  };
  set_scale(3, -1e9F);
  EXPECT_EQ(cache.group(0).back(), 1e9F);
  set_scale(4, std::numeric_limits<float>::quiet_NaN());
  EXPECT_TRUE(std::isnan(cache.group(0).back()));
  rebuild(cache.span(), std::vector<std::int32_t>{0}, std::vector<std::int32_t>{0});
  EXPECT_EQ(cache.group(0), std::vector<float>(65));
}

// Sketches are those of the bytes that stand in the cache, of the written tokens alone.
TEST(PageSizes, SketchesOfWhatIsWritten) {
  for (const std::int64_t page_size : {32, 64, 128}) {
    for (const int sketch : {2, 4}) {
      for (const bool tail : {false, true}) {
        for (const std::int64_t dim : {64, 128}) {
          SCOPED_TRACE(testing::Message() << "pages of " << page_size << ", " << sketch
                                          << " bits, tail " << tail << ", D = " << dim);
          constexpr std::int64_t kPages = 4;
          const std::int64_t stride =
              tail ? page_tail(dim, page_size, sketch).page_stride + 128 : page_size * (dim + 4);
          const std::int64_t bytes = sketch_page_bytes(sketch, dim, page_size);
          std::vector<std::uint8_t> data(static_cast<std::size_t>(kPages * stride), kPoison);
          std::vector<std::uint8_t> beside(static_cast<std::size_t>(kPages * (bytes + 5)), kPoison);
          CacheSpan span{data.data(), kPages, dim, stride, nullptr, page_size};
          span.sketch_bits = sketch;
          if (tail) {
            span = with_tail(span);
            EXPECT_EQ(span.sketch, data.data() + page_tail(dim, page_size, sketch).sketch);
          } else {
            span.sketch = beside.data();
            span.sketch_stride = bytes + 5;
          }
          // What the sketches of the pages should hold.
          std::vector<std::vector<std::uint8_t>> wanted(
              kPages, std::vector<std::uint8_t>(static_cast<std::size_t>(bytes), kPoison));
          const auto encode = [&](std::int64_t slot) {
            const std::uint8_t* page = span.data + slot / page_size * stride;
            const std::int64_t token = slot % page_size;
            float scale = 0;
            std::memcpy(&scale, page + page_size * dim + 4 * token, sizeof scale);
            std::uint8_t* out = wanted[slot / page_size].data();
            encode_sketch(sketch, page + token * dim, scale, dim,
                          out + sketch_code_offset(sketch, dim, token),
                          out + sketch_scale_offset(sketch, dim, page_size, token));
          };
          const auto expect_wanted = [&] {
            for (std::int64_t page = 0; page < kPages; ++page) {
              const std::uint8_t* at = span.sketch + page * span.sketch_stride;
              EXPECT_EQ(std::vector<std::uint8_t>(at, at + bytes), wanted[page]) << page;
            }
            for (std::int64_t page = 0; !tail && page < kPages; ++page) {
              const auto end = beside.begin() + page * (bytes + 5) + bytes;
              EXPECT_TRUE(std::all_of(end, end + 5, [](auto b) { return b == kPoison; }));
            }
          };

          const std::vector<std::int64_t> slots{3, page_size + 1, -1, 2 * page_size - 1};
          std::vector<float> keys(static_cast<std::size_t>(std::ssize(slots) * dim));
          for (std::size_t i = 0; i < keys.size(); ++i) {
            keys[i] = std::sin(static_cast<float>(i * i));
          }
          append(span, {keys.data(), DType::f32, std::ssize(slots), dim}, slots);
          for (const std::int64_t slot : slots) {
            if (slot >= 0) {
              encode(slot);
            }
          }
          expect_wanted();

          append(span, std::vector<std::int64_t>{0});  // the poison, as an engine's bytes
          encode(0);
          expect_wanted();

          const CacheView view{span.data,
                               span.pages,
                               span.dim,
                               span.page_stride,
                               span.page_sums,
                               span.page_size,
                               span.page_sums_stride,
                               span.largest_scales,
                               span.largest_scales_stride,
                               span.sketch,
                               span.sketch_bits,
                               span.sketch_stride};
          copy_pages(view, std::vector<std::int32_t>{1}, span, std::vector<std::int32_t>{3});
          wanted[3] = wanted[1];
          expect_wanted();

          rebuild(span, std::vector<std::int32_t>{2, 0}, std::vector<std::int32_t>{7, 0});
          for (std::int64_t slot = 2 * page_size; slot < 2 * page_size + 7; ++slot) {
            encode(slot);
          }
          expect_wanted();
          rebuild(span, std::vector<std::int32_t>{0});
          for (std::int64_t slot = 0; slot < page_size; ++slot) {
            encode(slot);
          }
          expect_wanted();
        }
      }
    }
  }
}

// Multiples of 128 bytes, in the order of the specification.
TEST(PageSizes, TailOfAPage) {
  const PageTail two_bits = page_tail(128, 64, 2);
  EXPECT_EQ(two_bits.page_sums, 8448);
  EXPECT_EQ(two_bits.largest_scales, 8448 + 512);
  EXPECT_EQ(two_bits.sketch, 8448 + 512 + 128);
  EXPECT_EQ(two_bits.page_stride, 11264);
  EXPECT_EQ(page_tail(128, 64, 4).page_stride, 13440);
  const PageTail small = page_tail(64, 32);
  EXPECT_EQ(small.page_sums, 17 * 128);
  EXPECT_EQ(small.page_stride, 17 * 128);
  const PageTail large = page_tail(64, 128);
  EXPECT_EQ(large.page_sums, 128 * 68);
  EXPECT_EQ(large.largest_scales, 128 * 68 + 2 * 256);
  EXPECT_EQ(large.page_stride, 128 * 68 + 2 * 256 + 128);
}

TEST(PageSizes, WrongArgumentsSmoke) {
  const AnyCache large(64, {128, 0, false});
  const std::vector<std::int64_t> none;
  const auto refused = [](const std::string& expected, const std::function<void()>& call) {
    try {
      call();
      ADD_FAILURE() << "expected an error: " << expected;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
      EXPECT_THAT(error.what(), HasSubstr(expected));
    }
  };
  const auto with = [&](auto member, auto value) {
    return [&, member, value] {
      CacheSpan span = large.span();
      span.*member = value;
      append(span, {nullptr, DType::f32, 0, 64}, none);
    };
  };
  std::vector<float> array(8);
  for (const std::int64_t size : {0, 16, 48, 256, -64}) {
    refused("cache: expected a page size of 32, 64 or 128, got " + std::to_string(size),
            with(&CacheSpan::page_size, size));
    refused("page_size: expected 32, 64 or 128, got " + std::to_string(size),
            [&] { cache_bytes(1, 64, size); });
  }
  refused("page_sums: expected none for pages of 32 tokens, got an array",
          with(&CacheSpan::page_size, std::int64_t{32}));
  refused("page_sums: expected a page stride of at least 128, got 127",
          with(&CacheSpan::page_sums_stride, std::int64_t{127}));
  refused("page_sums: expected a page stride of at least 128, got -128",
          with(&CacheSpan::page_sums_stride, std::int64_t{-128}));
  refused("page_sums: expected a size below 2^63, got",
          with(&CacheSpan::page_sums_stride, std::int64_t{1} << 60));
  refused("largest_scales: expected a page stride of at least 2, got 1",
          with(&CacheSpan::largest_scales_stride, std::int64_t{1}));
  refused("largest_scales: expected none without page_sums, got an array",
          with(&CacheSpan::page_sums, static_cast<float*>(nullptr)));
  refused("slots[0]: expected -1 to 511, got 512",
          [&] { append(large.span(), std::vector<std::int64_t>{512}); });
  refused("slots: expected each at most once, got 5 twice", [&] {
    append(large.span(), std::vector<std::int64_t>{5, 5});
  });
  refused("filled[0]: expected 0 to 128, got 129", [&] {
    rebuild(large.span(), std::vector<std::int32_t>{0}, std::vector<std::int32_t>{129});
  });
  refused("target: expected a page size of 64 as the source has, got 128", [&] {
    const AnyCache other(64, {64, 0, false});
    copy_pages(other.view(), {}, large.span(), {});
  });
  refused("source: expected largest scales, because the target has them, got none", [&] {
    CacheView view = large.view();
    view.largest_scales = nullptr;
    copy_pages(view, {}, large.span(), {});
  });
  const auto sketched = [&](int bits_of, std::uint8_t* sketch, std::int64_t stride) {
    return [=, &large] {
      CacheSpan span = large.span();
      span.sketch_bits = bits_of;
      span.sketch = sketch;
      span.sketch_stride = stride;
      rebuild(span, std::vector<std::int32_t>{0});
    };
  };
  static std::uint8_t byte = 0;
  refused("sketch_bits: expected 0 (none), 2 or 4, got 8", sketched(8, &byte, 0));
  refused("sketch_bits: expected 2 or 4, as there is a sketch, got 0", sketched(0, &byte, 0));
  refused("sketch: expected data for 4 elements, got null", sketched(2, nullptr, 0));
  refused("sketch: expected a page stride of at least 2304, got 2303", sketched(2, &byte, 2303));
  refused("source: expected a sketch of 4 bits, because the target has one, got 2", [&] {
    CacheView view = large.view();
    view.sketch = &byte;
    view.sketch_bits = 2;
    CacheSpan span = large.span();
    span.sketch = &byte;
    span.sketch_bits = 4;
    copy_pages(view, {}, span, {});
  });
  refused("sketch_bits: expected 0 (none), 2 or 4, got 3", [] { page_tail(64, 64, 3); });
  refused("dim: expected 64 or 128, got 32", [] { page_tail(32); });
  refused("cache: expected a page stride of at least 4736 bytes, a multiple of 128, got 4740", [&] {
    with_tail(CacheSpan{nullptr, 0, 64, 4740});
  });
  refused("cache: expected a page stride of at least 4736 bytes, a multiple of 128, got 4608", [&] {
    with_tail(CacheSpan{nullptr, 0, 64, 4608});
  });
}

}  // namespace
}  // namespace misa
