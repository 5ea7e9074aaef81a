// SPDX-License-Identifier: Apache-2.0
// Every wrong argument of a call on block means is refused with a message that names it, and
// nothing is written.
#include <gmock/gmock.h>

#include <functional>
#include <limits>
#include <string>
#include <vector>

#include "misa/misa.hpp"

namespace misa {
namespace {

using ::testing::Each;
using ::testing::StartsWith;

constexpr std::int32_t kPoison = -77;
constexpr std::int64_t kHuge = std::int64_t{1} << 60;

// A correct call, of which each case makes one argument wrong.
struct MeansCall {
  std::vector<float> q_data = std::vector<float>(4 * 8 * 64);
  std::vector<float> w_data = std::vector<float>(4 * 8);
  std::vector<float> rows = std::vector<float>(10 * 64);
  std::vector<std::int32_t> starts{0, 0, 5, 10};
  std::vector<std::int32_t> ends{4, 5, 10, 10};
  std::vector<std::int32_t> partial{-1, 4, -1, 9};
  std::vector<std::int32_t> out_data = std::vector<std::int32_t>(4 * 3, kPoison);

  Queries q{q_data.data(), DType::f32, 4, 8, 64, 0, 0};
  Weights w{w_data.data(), 4, 8, 0};
  RaggedMeans means{rows.data(), 10, 64, 0, starts, ends, partial};
  std::span<std::int32_t> out{out_data};
  int width = 3;  // heads or blocks

  template <class Call>
  [[nodiscard]] std::string message(const Call& call) const {
    try {
      call(Context({.backend = "reference"}), q, w, means, width, out);
    } catch (const Error& error) {
      EXPECT_EQ(error.code(), ErrorCode::invalid_argument);
      return error.what();
    }
    return "no error";
  }
};

struct Spoiled {
  std::string_view message;
  std::function<void(MeansCall&)> spoil;
};

const std::vector<Spoiled> kSpoiled{
    {"q: expected f32, bf16 or e4m3", [](MeansCall& c) { c.q.dtype = static_cast<DType>(7); }},
    {"q: expected D = 64 or 128, got 32", [](MeansCall& c) { c.q.dim = 32; }},
    {"w: expected T = 4 as q has, got 3", [](MeansCall& c) { c.w.tokens = 3; }},
    {"w: expected H = 8 as q has, got 7", [](MeansCall& c) { c.w.heads = 7; }},
    {"means: expected M = 0 to 1073741823, got -1", [](MeansCall& c) { c.means.count = -1; }},
    {"means: expected M = 0 to 1073741823, got 1073741824",
     [](MeansCall& c) { c.means.count = std::int64_t{1} << 30; }},
    {"means: expected D = 64 as q has, got 128", [](MeansCall& c) { c.means.dim = 128; }},
    {"means: expected a row stride of at least 64, got 63",
     [](MeansCall& c) { c.means.row_stride = 63; }},
    {"means: expected a row stride of at least 64, got -64",
     [](MeansCall& c) { c.means.row_stride = -64; }},
    {"means: expected a size below 2^63", [](MeansCall& c) { c.means.row_stride = kHuge; }},
    {"means: expected data for 10 elements, got null",
     [](MeansCall& c) { c.means.data = nullptr; }},
    {"means: expected data aligned to 4 bytes",
     [](MeansCall& c) {
       c.means.data =
           reinterpret_cast<const float*>(reinterpret_cast<const char*>(c.rows.data()) + 2);
     }},
    {"starts: expected 4 entries (T), got 3",
     [](MeansCall& c) { c.means.starts = c.means.starts.first(3); }},
    {"ends: expected 4 entries (T), got 0", [](MeansCall& c) { c.means.ends = {}; }},
    {"partial: expected 4 entries (T) or none, got 3",
     [](MeansCall& c) { c.means.partial = c.means.partial.first(3); }},
    {"starts[1]: expected 0 to M = 10, got -1", [](MeansCall& c) { c.starts[1] = -1; }},
    {"starts[3]: expected 0 to M = 10, got 11", [](MeansCall& c) { c.starts[3] = 11; }},
    {"ends[0]: expected 0 to M = 10, got -2147483648",
     [](MeansCall& c) { c.ends[0] = std::numeric_limits<std::int32_t>::min(); }},
    {"ends[2]: expected 0 to M = 10, got 11", [](MeansCall& c) { c.ends[2] = 11; }},
    {"partial[1]: expected -1 (none) to M - 1 = 9, got 10",
     [](MeansCall& c) { c.partial[1] = 10; }},
    {"partial[3]: expected -1 (none) to M - 1 = 9, got -2",
     [](MeansCall& c) { c.partial[3] = -2; }},
    {"out: expected 4 * 3 elements, got 11", [](MeansCall& c) { c.out = c.out.first(11); }},
    {"out: expected 4 * 3 elements, got 0", [](MeansCall& c) { c.out = {}; }},
};

template <class Call>
void expect_refused(const Call& call, const Spoiled& spoiled) {
  MeansCall given;
  spoiled.spoil(given);
  EXPECT_THAT(given.message(call), StartsWith(std::string(spoiled.message)));
  EXPECT_THAT(given.out_data, Each(kPoison)) << spoiled.message;
}

TEST(MeansArguments, SmokeNamesWhatIsWrong) {
  EXPECT_EQ(MeansCall().message(route_from_means), "no error");
  EXPECT_EQ(MeansCall().message(keep_blocks_from_means), "no error");
  for (const Spoiled& spoiled : kSpoiled) {
    expect_refused(route_from_means, spoiled);
    expect_refused(keep_blocks_from_means, spoiled);
  }
  expect_refused(route_from_means,
                 {"heads: expected 0 to H = 8, got 9", [](MeansCall& c) { c.width = 9; }});
  expect_refused(route_from_means,
                 {"heads: expected 0 to H = 8, got -1", [](MeansCall& c) { c.width = -1; }});
  expect_refused(keep_blocks_from_means,
                 {"filter_blocks: expected 2 or more, got 1", [](MeansCall& c) { c.width = 1; }});
  expect_refused(keep_blocks_from_means, {"out: expected 4 * 2147483647 elements",
                                          [](MeansCall& c) { c.width = 2147483647; }});
}

}  // namespace
}  // namespace misa
