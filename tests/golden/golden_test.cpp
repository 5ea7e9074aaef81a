// SPDX-License-Identifier: Apache-2.0
// Holds every bit of every result: the hashes of what each backend returns are recorded in
// <backend>.txt beside this file, one line per case. A change that should not change results leaves
// them equal; a change that corrects results records them again and says why:
//   MISA_GOLDEN_RECORD=tests/golden build/release/tests/misa_tests_golden
//
// A hash covers the indices sorted by position with their scores, every NaN as one NaN, the heads
// and the residual row. The bits depend on the backend and, on a device, on its compute capability,
// elsewhere on the compiler and the architecture. The first line of a file names these; on others
// nothing is compared.
#include <fmt/format.h>
#include <gtest/gtest.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <limits>
#include <map>
#include <numeric>
#include <string>
#include <vector>

#include "indexers/common.hpp"

namespace misa::test {
namespace {

constexpr int kTopK = 48;

// 64-bit FNV-1a.
class Hash {
 public:
  void add(std::uint32_t word) {
    for (int shift = 0; shift < 32; shift += 8) {
      constexpr std::uint64_t kPrime = 0x100000001b3;
      value_ = (value_ ^ (word >> shift & 0xff)) * kPrime;
    }
  }
  void add(std::int32_t value) { add(static_cast<std::uint32_t>(value)); }
  void add(float value) {
    constexpr std::uint32_t kNaN = 0x7fc00000;
    add(std::isnan(value) ? kNaN : std::bit_cast<std::uint32_t>(value));
  }
  [[nodiscard]] std::uint64_t value() const { return value_; }

 private:
  std::uint64_t value_ = 0xcbf29ce484222325;
};

std::string hash_of(const Selected& result) {
  Hash hash;
  std::vector<std::int64_t> order(static_cast<std::size_t>(result.top_k));
  for (std::int64_t t = 0; t < result.tokens; ++t) {
    const std::int64_t row = t * result.top_k;
    std::iota(order.begin(), order.end(), row);
    std::ranges::sort(order, {}, [&](std::int64_t i) { return result.indices[i]; });
    for (const std::int64_t i : order) {
      hash.add(result.indices[i]);
      hash.add(result.scores[i]);
    }
  }
  std::ranges::for_each(result.heads, [&](std::int32_t head) { hash.add(head); });
  std::ranges::for_each(result.residual, [&](float value) { hash.add(value); });
  return fmt::format("{:016x}", hash.value());
}

struct NamedPack {
  std::string name;
  Pack pack;
  bool paged = false;
};

NamedPack named(const std::string& name, std::int64_t heads, std::int64_t dim, DType q_dtype,
                DType k_dtype, std::vector<SequenceSpec> sequences,
                Values values = Values::normal) {
  PackSpec spec;
  spec.sequences = std::move(sequences);
  spec.heads = heads;
  spec.dim = dim;
  spec.q_dtype = q_dtype;
  spec.k_dtype = k_dtype;
  spec.values = values;
  spec.seed = 20261129;
  return {name, make_pack(spec)};
}

std::vector<NamedPack> packs() {
  using enum DType;
  const std::vector<SequenceSpec> ragged{{0, 1}, {1, 1}, {47, 2}, {129, 2}, {400, 3}, {1777, 5}};
  std::vector<NamedPack> all;
  all.push_back(named("f32 8x64", 8, 64, f32, f32, ragged));
  all.push_back(named("bf16 8x128", 8, 128, bf16, bf16, ragged));
  all.push_back(named("bf16 on e4m3 8x64", 8, 64, bf16, e4m3, ragged));
  all.push_back(named("e4m3 32x128", 32, 128, e4m3, e4m3, ragged));
  all.push_back(named("e4m3 64x128, long", 64, 128, e4m3, e4m3, {{300, 40}, {6000, 9}}));
  all.push_back(named("e4m3 8x64, ties", 8, 64, e4m3, e4m3, ragged, Values::integers));
  all.push_back(named("f32 8x64, zeros", 8, 64, f32, f32, ragged, Values::zero));
  all.push_back(named("bf16 8x64, repeated", 8, 64, bf16, bf16, ragged, Values::repeated));

  NamedPack broken = named("e4m3 8x128, NaN", 8, 128, e4m3, e4m3, {{300, 3}, {1200, 5}, {64, 2}});
  broken.pack.set_k(1, 301, 9, std::numeric_limits<float>::quiet_NaN());
  broken.pack.set_q(4, 2, 5, std::numeric_limits<float>::quiet_NaN());
  broken.pack.scale[0][17] = -broken.pack.scale[0][17];
  broken.pack.scale[1][18] = std::numeric_limits<float>::infinity();
  broken.pack.w[1] = -std::numeric_limits<float>::infinity();
  all.push_back(std::move(broken));

  NamedPack paged = named("e4m3 64x128, pages", 64, 128, e4m3, e4m3, {{2000, 2}, {65, 2}, {1, 2}});
  paged.paged = true;
  all.push_back(std::move(paged));
  return all;
}

// The published indexers, then every router with and without all other options.
std::vector<NamedConfig> configs(std::int64_t heads) {
  std::vector<NamedConfig> all = named_configs(kTopK, 3);
  for (const std::string_view name : router_names()) {
    IndexerConfig config = IndexerConfig::misa_r(kTopK, 3, 100);
    config.router = router_by_name(name);
    config.residual = config.router != Router::all;
    config.block = 64;
    config.filter_block = 128;
    config.filter_blocks = 3;
    if (config.router == Router::fixed) {
      config.static_heads = {5, 0, 3};
    }
    all.push_back({fmt::format("{}, everything", name), config});
    config.filter_block = 0;
    config.candidates = 0;
    config.residual = false;
    all.push_back({fmt::format("{} alone", name), config});
  }
  IndexerConfig every = IndexerConfig::misa_r(kTopK, static_cast<int>(heads), 100);
  all.push_back({"every head", every});
  return all;
}

using Lines = std::map<std::string, std::string>;

Lines hashes(const Context& context) {
  Lines lines;
  for (const NamedPack& pack : packs()) {
    for (const NamedConfig& each : configs(pack.pack.spec.heads)) {
      const Selected result = pack.paged ? run(context, each.config,
                                               PagedInputs(pack.pack, {.shuffle = 7, .padding = 1}))
                                         : run(context, each.config, RaggedInputs(pack.pack, 16));
      lines[pack.name + ", " + each.name] = hash_of(result);
    }
  }
  return lines;
}

// What the bits depend on beside the backend.
std::string owner(const std::string& backend) {
#if defined(__clang__)
  const std::string compiler = "Clang";
#else
  const std::string compiler = fmt::format("GCC {}", __GNUC__);
#endif
  if (!backend.starts_with("cuda-")) {
#if defined(__x86_64__)
    return compiler + ", x86-64";
#else
    return compiler + ", another architecture";
#endif
  }
  for (const Fact& fact : facts()) {
    const std::size_t at = fact.value.find("compute capability");
    if (fact.name == "cuda device 0" && at != std::string::npos) {
      return fact.value.substr(at, fact.value.find(',', at) - at);
    }
  }
  return "no device";
}

std::string folder(const char* variable, const char* otherwise) {
  const char* value = std::getenv(variable);
  return value != nullptr ? value : otherwise;
}

class Golden : public EachBackend {};

TEST_P(Golden, BitsAreThoseRecorded) {
  const std::string of = owner(GetParam());
  const std::string name = "/" + GetParam() + ".txt";
  if (const std::string record = folder("MISA_GOLDEN_RECORD", ""); !record.empty()) {
    std::ofstream out(record + name);
    out << of << '\n';
    for (const auto& [what, hash] : hashes(context())) {
      out << hash << ' ' << what << '\n';
    }
    ASSERT_TRUE(out.flush());
    return;
  }
  std::ifstream in(folder("MISA_GOLDEN", MISA_GOLDEN_FOLDER) + name);
  std::string recorded_of;
  if (!std::getline(in, recorded_of) || recorded_of != of) {
    GTEST_SKIP() << "recorded of '" << recorded_of << "', this is '" << of << "'";
  }
  Lines recorded;
  for (std::string hash, what; in >> hash && std::getline(in >> std::ws, what);) {
    recorded[what] = hash;
  }
  EXPECT_EQ(hashes(context()), recorded);
}

INSTANTIATE_TEST_SUITE_P(Each, Golden, ::testing::ValuesIn(available_backends()), backend_name);

}  // namespace
}  // namespace misa::test
