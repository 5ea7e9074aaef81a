// SPDX-License-Identifier: Apache-2.0
// Writing the paged key cache in device memory: after every call all bytes, those of padding and
// red zones included, are what the same call makes of the same cache in host memory. Only sums are
// rounded otherwise, once per token; those that are NaN may have any NaN's bits.
#include "misa/cache.hpp"

#include <gmock/gmock.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <optional>
#include <random>
#include <string>
#include <vector>

#include "common.hpp"
#include "core/sketch.hpp"
#include "misa/cuda.hpp"
#include "misa/error.hpp"

namespace misa::test {
namespace {

using ::testing::HasSubstr;

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

struct Layout {
  std::int64_t page_size;
  std::int64_t padding;  // of every stride, in units of 4 bytes
  bool tail;
  bool sums;
  int sketch = 0;  // bits
};

std::vector<Layout> layouts() {
  std::vector<Layout> all;
  for (const std::int64_t page_size : {32, 64, 128}) {
    all.push_back({page_size, 0, false, false});
    all.push_back({page_size, 0, false, false, 2});
    all.push_back({page_size, 0, false, true, 4});
    all.push_back({page_size, 3, false, true});  // rows of words, not of 16 bytes
    all.push_back({page_size, 3, false, true, 2});
    all.push_back({page_size, 32, true, true});
    all.push_back({page_size, 0, true, true, 2});
    all.push_back({page_size, 32, true, true, 4});
  }
  return all;
}

// A cache's arrays. Unused ones are empty.
struct Arrays {
  std::vector<std::uint8_t> data;
  std::vector<float> sums;
  std::vector<float> largest;
  std::vector<std::uint8_t> sketch;
};

// One cache in host and in device memory, with the same content.
class Twins {
 public:
  Twins(std::int64_t slots, std::int64_t dim, const Layout& layout, unsigned seed)
      : layout_(layout), pages_(slots / layout.page_size), dim_(dim) {
    std::mt19937 random(seed);
    const std::int64_t groups = layout.page_size / kGroupSize;
    const std::int64_t dense = layout.tail
                                   ? page_tail(dim, layout.page_size, layout.sketch).page_stride
                                   : layout.page_size * (dim + 4);
    page_stride_ = dense + 4 * layout.padding;
    host_.data.resize(static_cast<std::size_t>(pages_ * page_stride_));
    std::generate(host_.data.begin(), host_.data.end(),
                  [&] { return static_cast<std::uint8_t>(random()); });
    if (layout.sums && !layout.tail && groups > 0) {
      sums_stride_ = groups * dim + layout.padding;
      largest_stride_ = groups + layout.padding;
      host_.sums.assign(static_cast<std::size_t>(pages_ * sums_stride_), -77.0F);
      host_.largest.assign(static_cast<std::size_t>(pages_ * largest_stride_), -77.0F);
    }
    if (layout.sketch != 0 && !layout.tail) {
      sketch_stride_ =
          sketch_page_bytes(layout.sketch, dim, layout.page_size) + 16 * layout.padding;
      host_.sketch.assign(static_cast<std::size_t>(pages_ * sketch_stride_), 0x5a);
    }
    data_.emplace(std::span<const std::uint8_t>(host_.data));
    sketch_.emplace(std::span<const std::uint8_t>(host_.sketch));
    sums_.emplace(std::span<const float>(host_.sums));
    largest_.emplace(std::span<const float>(host_.largest));
  }

  [[nodiscard]] CacheSpan host() { return span_of(host_); }
  [[nodiscard]] CacheSpan device() const {
    return span_of(data_->data(), sums_->data(), largest_->data(), sketch_->data());
  }

  [[nodiscard]] std::int64_t pages() const { return pages_; }
  [[nodiscard]] std::int64_t slots() const { return pages_ * layout_.page_size; }

  // Writes random bytes and scales into a slot of both, as an engine's kernel would.
  void write(std::int64_t slot, std::mt19937& random) {
    const std::int64_t page = slot / layout_.page_size * page_stride_;
    const std::int64_t token = slot % layout_.page_size;
    const auto element = page + token * dim_;
    std::generate_n(host_.data.begin() + element, dim_,
                    [&] { return static_cast<std::uint8_t>(random() % 256); });
    const float scale = random() % 8 == 0
                            ? std::bit_cast<float>(static_cast<std::uint32_t>(random()))
                            : static_cast<float>(random() % 1000) - 300.0F;
    const auto at = page + layout_.page_size * dim_ + 4 * token;
    std::memcpy(host_.data.data() + at, &scale, sizeof scale);
    for (const auto& [first, count] : {std::pair{element, dim_}, std::pair{at, std::int64_t{4}}}) {
      expect_success(cudaMemcpy(data_->data() + first, host_.data.data() + first,
                                static_cast<std::size_t>(count), cudaMemcpyHostToDevice));
    }
  }

  // The group's sum is now that of its first `tokens` tokens; -1: as no call has written it.
  void set_counted(std::int64_t group, std::int64_t tokens) {
    counted_.resize(static_cast<std::size_t>(slots() / kGroupSize), -1);
    counted_[group] = tokens;
  }
  [[nodiscard]] std::int64_t counted(std::int64_t group) const {
    return group < std::ssize(counted_) ? counted_[group] : -1;
  }
  void set_appended(std::vector<std::int64_t> slots) {
    std::sort(slots.begin(), slots.end());
    for (const std::int64_t slot : slots) {
      if (slot >= 0) {
        set_counted(slot / kGroupSize, slot % kGroupSize + 1);
      }
    }
  }

  void expect_same() {
    expect_success(cudaDeviceSynchronize());
    Arrays got{data_->read(), sums_->read(), largest_->read(), sketch_->read()};
    Arrays wanted = host_;
    round_as_devices(span_of(wanted));
    for (Arrays* arrays : {&got, &wanted}) {
      unify_nans(span_of(*arrays));
    }
    EXPECT_EQ(got.data, wanted.data);
    EXPECT_EQ(got.sketch, wanted.sketch);
    EXPECT_TRUE(same_words(got.sums, wanted.sums));
    EXPECT_TRUE(same_words(got.largest, wanted.largest));
  }

 private:
  [[nodiscard]] CacheSpan span_of(Arrays& arrays) const {
    return span_of(arrays.data.data(), arrays.sums.data(), arrays.largest.data(),
                   arrays.sketch.data());
  }
  [[nodiscard]] CacheSpan span_of(std::uint8_t* data, float* sums, float* largest,
                                  std::uint8_t* sketch) const {
    CacheSpan span{data, pages_, dim_, page_stride_};
    span.page_size = layout_.page_size;
    span.sketch_bits = layout_.sketch;
    if (layout_.tail) {
      return with_tail(span);
    }
    if (layout_.sketch != 0) {
      span.sketch = sketch;
      span.sketch_stride = sketch_stride_;
    }
    if (sums_stride_ > 0) {
      span.page_sums = sums;
      span.page_sums_stride = sums_stride_;
      span.largest_scales = largest;
      span.largest_scales_stride = largest_stride_;
    }
    return span;
  }

  // Replaces the sums that calls have written by those with one rounding per token.
  void round_as_devices(const CacheSpan& cache) const {
    const std::int64_t groups = cache.page_size / kGroupSize;
    for (std::int64_t group = 0; cache.page_sums != nullptr && group < std::ssize(counted_);
         ++group) {
      if (counted_[group] < 0) {
        continue;
      }
      const std::uint8_t* page = cache.data + group / groups * cache.page_stride;
      const std::int64_t first = group % groups * kGroupSize;
      float* sum =
          cache.page_sums + group / groups * cache.page_sums_stride + group % groups * cache.dim;
      std::fill_n(sum, cache.dim, 0.0F);
      for (std::int64_t i = first; i < first + counted_[group]; ++i) {
        float scale = 0;
        std::memcpy(&scale, page + cache.page_size * cache.dim + 4 * i, sizeof scale);
        for (std::int64_t d = 0; d < cache.dim; ++d) {
          sum[d] = std::fma(scale, e4m3_to_float(page[i * cache.dim + d]), sum[d]);
        }
      }
    }
  }

  static void unify_nans(const CacheSpan& cache) {
    const std::int64_t count = cache.page_size / kGroupSize * cache.dim;
    for (std::int64_t page = 0; cache.page_sums != nullptr && page < cache.pages; ++page) {
      float* sums = cache.page_sums + page * cache.page_sums_stride;
      std::replace_if(
          sums, sums + count, [](float sum) { return std::isnan(sum); }, kNaN);
    }
  }

  static bool same_words(const std::vector<float>& a, const std::vector<float>& b) {
    return a.size() == b.size() &&
           (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(float)) == 0);
  }

  Layout layout_;
  std::int64_t pages_;
  std::int64_t dim_;
  std::int64_t page_stride_ = 0;
  std::int64_t sums_stride_ = 0;
  std::int64_t largest_stride_ = 0;
  std::int64_t sketch_stride_ = 0;
  std::vector<std::int64_t> counted_;  // per group, see set_counted
  Arrays host_;
  std::optional<Guarded<std::uint8_t>> data_;
  std::optional<Guarded<float>> sums_;
  std::optional<Guarded<float>> largest_;
  std::optional<Guarded<std::uint8_t>> sketch_;
};

// What the device takes and the host refuses, as the host takes it: slots out of range are skipped,
// and of equal slots the last one counts.
std::vector<std::int64_t> for_host(const std::vector<std::int64_t>& slots, std::int64_t end) {
  std::vector<std::int64_t> last(static_cast<std::size_t>(end), -1);
  for (std::size_t i = 0; i < slots.size(); ++i) {
    if (slots[i] >= 0 && slots[i] < end) {
      last[slots[i]] = static_cast<std::int64_t>(i);
    }
  }
  std::vector<std::int64_t> kept;
  for (std::size_t i = 0; i < slots.size(); ++i) {
    const bool counts =
        slots[i] >= 0 && slots[i] < end && last[slots[i]] == static_cast<std::int64_t>(i);
    kept.push_back(counts ? slots[i] : -1);
  }
  return kept;
}

// Keys of every kind: normal, tiny, huge, zero, with NaN of both signs and infinities.
std::vector<float> keys_of(std::int64_t tokens, std::int64_t stride, std::mt19937& random) {
  std::normal_distribution<float> normal;
  std::vector<float> keys(static_cast<std::size_t>(tokens * stride));
  for (std::int64_t i = 0; i < tokens; ++i) {
    const float factor = random() % 6 == 0   ? 0.0F
                         : random() % 6 == 0 ? 0x1p-130F
                         : random() % 6 == 0 ? 0x1p126F
                                             : 1.0F;
    for (std::int64_t d = 0; d < stride; ++d) {
      keys[i * stride + d] = factor * normal(random);
    }
    if (random() % 9 == 0) {
      for (const float value : {kNaN, -kNaN, kInf, -kInf}) {
        if (random() % 2 == 0) {
          keys[i * stride + static_cast<std::int64_t>(random() % 64)] = value;
        }
      }
    }
  }
  return keys;
}

using CacheOnDevice = OnDevice;

// Keys in device memory: f32, or bf16 of the same values.
class DeviceKeys {
 public:
  DeviceKeys(const std::vector<float>& keys, DType dtype, std::int64_t tokens, std::int64_t dim,
             std::int64_t stride)
      : dtype_(dtype), tokens_(tokens), dim_(dim), stride_(stride) {
    bytes_.resize(keys.size() * size_of(dtype));
    for (std::size_t i = 0; i < keys.size(); ++i) {
      if (dtype == DType::f32) {
        std::memcpy(bytes_.data() + 4 * i, &keys[i], 4);
      } else {
        const std::uint16_t half = float_to_bf16(keys[i]);
        std::memcpy(bytes_.data() + 2 * i, &half, 2);
      }
    }
    there_.emplace(std::span<const std::byte>(bytes_));
  }

  [[nodiscard]] NewKeys host() const { return {bytes_.data(), dtype_, tokens_, dim_, stride_}; }
  [[nodiscard]] NewKeys device() const { return {there_->data(), dtype_, tokens_, dim_, stride_}; }

 private:
  DType dtype_;
  std::int64_t tokens_;
  std::int64_t dim_;
  std::int64_t stride_;
  std::vector<std::byte> bytes_;
  std::optional<Guarded<std::byte>> there_;
};

void append_both(Twins& twins, const std::vector<std::int64_t>& slots, std::int64_t dim,
                 DType dtype, ScaleFormat format, std::mt19937& random) {
  const auto tokens = std::ssize(slots);
  const std::int64_t stride = dim + static_cast<std::int64_t>(random() % 2) * 3;
  const DeviceKeys keys(keys_of(tokens, stride, random), dtype, tokens, dim, stride);
  const Guarded<std::int64_t> there{std::span<const std::int64_t>(slots)};
  append(twins.host(), keys.host(), for_host(slots, twins.slots()), format);
  twins.set_appended(for_host(slots, twins.slots()));
  cuda::append(twins.device(), keys.device(), there.span(), nullptr, format);
  twins.expect_same();
}

TEST_F(CacheOnDevice, SmokeAppendEqualsTheHost) {
  std::mt19937 random(1);
  for (const std::int64_t dim : {64, 128}) {
    for (const Layout& layout : layouts()) {
      SCOPED_TRACE(testing::Message() << "pages of " << layout.page_size << ", padding "
                                      << layout.padding << ", tail " << layout.tail);
      Twins twins(512, dim, layout, 7);
      for (int step = 0; step < 24; ++step) {
        // Decode steps, runs that cross pages, rewinds and reuse: any slots, equal ones too.
        std::vector<std::int64_t> slots;
        const auto first = static_cast<std::int64_t>(random() % 512);
        const auto count = static_cast<std::int64_t>(1 + random() % (step % 3 == 0 ? 200 : 6));
        for (std::int64_t i = 0; i < count; ++i) {
          slots.push_back(step % 2 == 0 ? first + i
                                        : static_cast<std::int64_t>(random() % 520) - 4);
        }
        append_both(twins, slots, dim, step % 4 < 2 ? DType::f32 : DType::bf16,
                    step % 3 == 0 ? ScaleFormat::ue8m0 : ScaleFormat::f32, random);
        if (HasFailure()) {
          return;
        }
      }
    }
  }
}

// More tokens than a thread block reads between two votes, in order, shuffled and repeated.
TEST_F(CacheOnDevice, AppendsManyTokens) {
  std::mt19937 random(2);
  for (const Layout& layout : {Layout{64, 0, false, true, 2}, Layout{128, 32, true, true, 4},
                               Layout{32, 0, false, true, 2}}) {
    Twins twins(4096, 128, layout, 8);
    std::vector<std::int64_t> slots;
    for (std::int64_t i = 0; i < 3001; ++i) {
      slots.push_back(500 + i);
    }
    append_both(twins, slots, 128, DType::bf16, ScaleFormat::f32, random);
    std::shuffle(slots.begin(), slots.end(), random);
    append_both(twins, slots, 128, DType::f32, ScaleFormat::ue8m0, random);
    for (std::int64_t& slot : slots) {
      slot = static_cast<std::int64_t>(random() % 300) - 10;
    }
    append_both(twins, slots, 128, DType::f32, ScaleFormat::f32, random);
  }
}

TEST_F(CacheOnDevice, SmokeBytesOfAnEngineAreTaken) {
  std::mt19937 random(3);
  for (const Layout& layout : layouts()) {
    Twins twins(512, 64, layout, 9);
    for (int step = 0; step < 12; ++step) {
      std::vector<std::int64_t> slots;
      for (unsigned i = 0; i < 1 + random() % 40; ++i) {
        slots.push_back(static_cast<std::int64_t>(random() % 520) - 4);
        if (slots.back() >= 0 && slots.back() < 512) {
          twins.write(slots.back(), random);
        }
      }
      const Guarded<std::int64_t> there{std::span<const std::int64_t>(slots)};
      append(twins.host(), for_host(slots, 512));
      twins.set_appended(for_host(slots, 512));
      cuda::append(twins.device(), there.span(), nullptr);
      twins.expect_same();
    }
  }
}

TEST_F(CacheOnDevice, SmokeRebuildEqualsTheHost) {
  std::mt19937 random(4);
  for (const Layout& layout : layouts()) {
    Twins twins(1024, 128, layout, 10);
    if (twins.host().page_sums == nullptr && layout.sketch == 0) {
      continue;
    }
    const auto pages_in_all = static_cast<std::int32_t>(twins.pages());
    const auto size = static_cast<std::int32_t>(layout.page_size);
    for (const bool with_filled : {true, false}) {
      std::vector<std::int32_t> pages;
      std::vector<std::int32_t> filled;
      std::vector<std::int32_t> host_pages;
      std::vector<std::int32_t> host_filled;
      for (std::int32_t page = -2; page < pages_in_all + 2; ++page) {
        const auto count = static_cast<std::int32_t>(random() % (size + 40)) - 20;
        pages.push_back(page);
        filled.push_back(count);
        if (page >= 0 && page < pages_in_all) {
          host_pages.push_back(page);
          host_filled.push_back(std::clamp(count, 0, size));
        }
      }
      if (!with_filled) {
        filled.clear();
        host_filled.clear();
      }
      const Guarded<std::int32_t> there{std::span<const std::int32_t>(pages)};
      const Guarded<std::int32_t> counts{std::span<const std::int32_t>(filled)};
      rebuild(twins.host(), host_pages, host_filled);
      for (std::size_t i = 0; i < host_pages.size(); ++i) {
        const std::int64_t tokens = with_filled ? host_filled[i] : size;
        for (std::int64_t group = 0; group < size / kGroupSize; ++group) {
          twins.set_counted(host_pages[i] * (size / kGroupSize) + group,
                            std::clamp<std::int64_t>(tokens - group * kGroupSize, 0, kGroupSize));
        }
      }
      cuda::rebuild(twins.device(), there.span(), counts.span(), nullptr);
      twins.expect_same();
    }
  }
}

TEST_F(CacheOnDevice, SmokeCopyEqualsTheHost) {
  std::mt19937 random(5);
  for (const auto& [page_size, sketch] :
       {std::pair<std::int64_t, int>{32, 2}, {64, 4}, {128, 2}, {32, 0}, {64, 0}, {128, 4}}) {
    // Between caches of different strides, and within one.
    const bool sums = page_size > 32;
    Twins source(1024, 64, {page_size, 0, false, true, sketch}, 11);
    Twins wide(1024, 64, {page_size, 32, sums, true, sketch}, 12);
    Twins narrow(1024, 64, {page_size, 3, false, true, sketch}, 13);
    const auto pages = static_cast<std::int32_t>(source.pages());
    const auto copy = [&](Twins& in, Twins& out) {
      std::vector<std::int32_t> order(static_cast<std::size_t>(pages));
      for (std::int32_t page = 0; page < pages; ++page) {
        order[page] = page;
      }
      std::shuffle(order.begin(), order.end(), random);
      std::vector<std::int32_t> from(order.begin(), order.begin() + 3);
      std::vector<std::int32_t> to(order.begin() + 3, order.begin() + 6);
      const auto view_of = [](const CacheSpan& span) {
        return CacheView{span.data,
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
      };
      copy_pages(view_of(in.host()), from, out.host(), to);
      for (std::size_t i = 0; i < from.size(); ++i) {
        for (std::int64_t group = 0; group < page_size / kGroupSize; ++group) {
          out.set_counted(to[i] * (page_size / kGroupSize) + group,
                          in.counted(from[i] * (page_size / kGroupSize) + group));
        }
      }
      for (const auto& [a, b] : {std::pair{-1, order[6]}, std::pair{pages, order[7]},
                                 std::pair{order[0], pages}, std::pair{order[0], -1}}) {
        from.push_back(a);
        to.push_back(b);
      }
      const Guarded<std::int32_t> from_there{std::span<const std::int32_t>(from)};
      const Guarded<std::int32_t> to_there{std::span<const std::int32_t>(to)};
      cuda::copy_pages(view_of(in.device()), from_there.span(), out.device(), to_there.span(),
                       nullptr);
      out.expect_same();
    };
    copy(source, source);
    copy(source, wide);
    copy(wide, narrow);
    copy(narrow, narrow);
  }
}

// A captured call neither synchronises nor allocates, and follows its arrays when it is replayed.
TEST_F(CacheOnDevice, GraphsFollowTheirArrays) {
  std::mt19937 random(6);
  Twins twins(512, 128, {64, 32, true, true, 2}, 14);
  constexpr std::int64_t kTokens = 8;
  const Guarded<float> keys(kTokens * 128);
  const Guarded<std::int64_t> slots(kTokens);
  cudaStream_t stream = nullptr;
  expect_success(cudaStreamCreate(&stream));
  cudaGraph_t graph = nullptr;
  cudaGraphExec_t executable = nullptr;
  expect_success(cudaStreamBeginCapture(stream, cudaStreamCaptureModeThreadLocal));
  cuda::append(twins.device(), {keys.data(), DType::f32, kTokens, 128}, slots.span(), stream);
  expect_success(cudaStreamEndCapture(stream, &graph));
  expect_success(cudaGraphInstantiate(&executable, graph, 0));
  for (int step = 0; step < 20; ++step) {
    const std::vector<float> values = keys_of(kTokens, 128, random);
    std::vector<std::int64_t> at;
    for (std::int64_t i = 0; i < kTokens; ++i) {
      at.push_back(static_cast<std::int64_t>(random() % 520) - 4);
    }
    keys.write(values);
    slots.write(at);
    expect_success(cudaGraphLaunch(executable, stream));
    append(twins.host(), {values.data(), DType::f32, kTokens, 128}, for_host(at, 512));
    twins.set_appended(for_host(at, 512));
    twins.expect_same();
  }
  expect_success(cudaGraphExecDestroy(executable));
  expect_success(cudaGraphDestroy(graph));
  expect_success(cudaStreamDestroy(stream));
}

// Refused before anything is enqueued, so without a device too.
TEST(CacheOnDeviceArguments, AreRefused) {
  const auto refused = [](const std::string& expected, const auto& call) {
    try {
      call();
      ADD_FAILURE() << "expected an error: " << expected;
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
      EXPECT_THAT(error.what(), HasSubstr(expected));
    }
  };
  alignas(16) static std::uint8_t bytes[2 * 64 * 68];
  static const std::vector<float> keys(2 * 64);
  static const std::vector<std::int64_t> slots(2);
  static const std::vector<std::int32_t> pages(2);
  const CacheSpan cache{bytes, 2, 64};
  const NewKeys two{keys.data(), DType::f32, 2, 64};
  const CacheView view{bytes, 2, 64};
  CacheSpan wrong = cache;
  wrong.page_size = 16;
  refused("cache: expected a page size of 32, 64 or 128, got 16",
          [&] { cuda::append(wrong, two, slots, nullptr); });
  refused("cache: expected data aligned to 4 bytes", [&] {
    cuda::append({bytes + 1, 1, 64}, two, slots, nullptr);
  });
  refused("slots: expected 2, one a key, got 1",
          [&] { cuda::append(cache, two, std::span(slots).first(1), nullptr); });
  refused("slots: expected data for 2 elements, got null", [&] {
    cuda::append(cache, two, {static_cast<const std::int64_t*>(nullptr), 2}, nullptr);
  });
  refused("k: expected f32 or bf16, got dtype 2", [&] {
    cuda::append(cache, {bytes, DType::e4m3, 2, 64}, slots, nullptr);
  });
  refused("k: expected data for 2 elements, got null", [&] {
    cuda::append(cache, {nullptr, DType::f32, 2, 64}, slots, nullptr);
  });
  refused("scale format: expected f32 or ue8m0, got 7",
          [&] { cuda::append(cache, two, slots, nullptr, static_cast<ScaleFormat>(7)); });
  CacheSpan sketched = cache;
  sketched.sketch = bytes + 8;
  sketched.sketch_bits = 2;
  refused("sketch: expected data aligned to 16 bytes",
          [&] { cuda::append(sketched, two, slots, nullptr); });
  sketched.sketch = bytes;
  sketched.sketch_stride = 64 * 18 + 8;
  refused("sketch: expected a page stride of a multiple of 16 bytes, got 1160",
          [&] { cuda::rebuild(sketched, pages, {}, nullptr); });
  refused("page_sums: expected an array, or a sketch, got null",
          [&] { cuda::rebuild(cache, pages, {}, nullptr); });
  refused("to: expected 2 pages, one a page of from, got 1",
          [&] { cuda::copy_pages(view, pages, cache, std::span(pages).first(1), nullptr); });
}

}  // namespace
}  // namespace misa::test
