// SPDX-License-Identifier: Apache-2.0
// Sketches of keys on a device, byte by byte those of the host: keys of every kind, and the
// operands of queries. cache_test has the calls that write caches, paged_test the selections.
#include "core/sketch.hpp"

#include <bit>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>
#include <set>
#include <vector>

#include "common.hpp"
#include "core/problem.hpp"
#include "misa/cuda.hpp"
#include "score/sketch_keys.hpp"
#include "score/sketch_operands.hpp"
#include "score/sketch_order.hpp"

namespace misa::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

using SketchOnDevice = OnDevice;

// ---- keys

// Element d of a key of one of ten kinds.
std::uint8_t element_of(std::int64_t kind, std::int64_t d, std::mt19937& random) {
  const auto any = static_cast<std::uint8_t>(random() % 256);
  const auto finite = static_cast<std::uint8_t>(is_e4m3_nan(any) ? any ^ 1 : any);
  switch (kind % 10) {
    case 0: return 0;
    case 1: return 0x80;                                     // zeros of negative sign
    case 2: return d % 2 == 0 ? 0x38 : 0xb8;                 // a row of the rotation
    case 3: return 0x7e;                                     // the largest number
    case 4: return static_cast<std::uint8_t>(random() % 8);  // subnormal
    case 5: return d < 32 ? finite : std::uint8_t{0};        // groups of zeros
    case 6: return d == 17 ? finite : std::uint8_t{0};       // one element
    case 7: return any;                                      // with NaN
    case 8: return d < 32 ? finite : static_cast<std::uint8_t>(random() % 2);  // far apart
    default: return finite;
  }
}

TEST_F(SketchOnDevice, SmokeKeysOfEveryKindEqualTheHosts) {
  const std::vector<float> scales{1.0F, 0.0F,  -0.0F, -0.37F, 1e-3F,  3e38F, -1e30F,
                                  kInf, -kInf, kNaN,  1e-40F, 1e-44F, 146.3F};
  std::mt19937 random(5);
  for (const std::int64_t dim : {64, 128}) {
    for (const int sketch : {2, 4}) {
      constexpr std::int64_t kPages = 9;
      std::vector<std::uint8_t> data(static_cast<std::size_t>(cache_bytes(kPages, dim)));
      for (std::int64_t page = 0; page < kPages; ++page) {
        std::uint8_t* at = data.data() + page * 64 * (dim + 4);
        for (std::int64_t token = 0; token < 64; ++token) {
          const std::int64_t kind = page * 64 + token;
          for (std::int64_t d = 0; d < dim; ++d) {
            at[token * dim + d] = element_of(kind, d, random);
          }
          std::memcpy(at + 64 * dim + 4 * token, &scales[kind % scales.size()], 4);
        }
      }
      std::vector<std::uint8_t> wanted(
          static_cast<std::size_t>(kPages * sketch_page_bytes(sketch, dim, 64)));
      std::vector<std::int32_t> pages(kPages);
      std::iota(pages.begin(), pages.end(), 0);
      CacheSpan span{data.data(), kPages, dim};
      span.sketch = wanted.data();
      span.sketch_bits = sketch;
      rebuild(span, pages);

      const Guarded<std::uint8_t> data_there{std::span<const std::uint8_t>(data)};
      const Guarded<std::uint8_t> sketch_there(wanted.size());
      const Guarded<std::int32_t> pages_there{std::span<const std::int32_t>(pages)};
      span.data = data_there.data();
      span.sketch = sketch_there.data();
      cuda::rebuild(span, pages_there.span(), {}, nullptr);
      expect_success(cudaDeviceSynchronize());
      EXPECT_EQ(sketch_there.read(), wanted) << "D = " << dim << ", " << sketch << " bits";

      // The keys in one array, as prefill has them.
      std::vector<std::uint8_t> k;
      std::vector<float> scale;
      for (std::int64_t page = 0; page < kPages; ++page) {
        const std::uint8_t* at = data.data() + page * 64 * (dim + 4);
        k.insert(k.end(), at, at + 64 * dim);
        for (std::int64_t token = 0; token < 64; ++token) {
          scale.push_back(scales[(page * 64 + token) % scales.size()]);
        }
      }
      const std::int64_t tokens = std::ssize(scale) - 3;  // not a multiple of anything
      std::vector<std::uint8_t> ragged(
          static_cast<std::size_t>(sketch_page_bytes(sketch, dim, tokens)));
      for (std::int64_t i = 0; i < tokens; ++i) {
        encode_sketch(sketch, k.data() + i * dim, scale[i], dim,
                      ragged.data() + sketch_code_offset(sketch, dim, i),
                      ragged.data() + sketch_scale_offset(sketch, dim, tokens, i));
      }
      const Guarded<std::uint8_t> k_there{std::span<const std::uint8_t>(k)};
      const Guarded<float> scale_there{std::span<const float>(scale)};
      const Guarded<std::uint8_t> ragged_there(ragged.size());
      cuda::DeviceRaggedSource keys{};
      keys.data = k_there.data();
      keys.dtype = DType::e4m3;
      keys.tokens = tokens;
      keys.stride = dim;
      keys.scale = scale_there.data();
      cuda::score::launch_sketches(keys, sketch, dim, ragged_there.data(), nullptr);
      expect_success(cudaDeviceSynchronize());
      EXPECT_EQ(ragged_there.read(), ragged) << "D = " << dim << ", " << sketch << " bits";
    }
  }
}

// ---- the operands of queries

// Queries of every kind: normal, tiny, huge, zero, alternating, with NaN and infinities.
std::vector<std::byte> queries_of(DType dtype, std::int64_t rows, std::int64_t dim) {
  std::mt19937 random(3);
  std::normal_distribution<float> normal;
  std::vector<std::byte> bytes(static_cast<std::size_t>(rows * dim) * size_of(dtype));
  for (std::int64_t r = 0; r < rows; ++r) {
    const float factor = r % 7 == 1 ? 0.0F : r % 7 == 2 ? 0x1p-140F : r % 7 == 3 ? 0x1p120F : 1.0F;
    for (std::int64_t d = 0; d < dim; ++d) {
      const float value = r % 7 == 4 ? (d % 2 == 0 ? 3.5F : -3.5F) : factor * normal(random);
      encode(value, dtype, bytes.data() + r * dim * static_cast<std::int64_t>(size_of(dtype)), d);
    }
    if (r % 7 == 5) {
      encode(r % 2 == 0 ? kNaN : kInf, dtype,
             bytes.data() + r * dim * static_cast<std::int64_t>(size_of(dtype)), r % dim);
    }
  }
  return bytes;
}

// Appends a row; for Hopper's kernels in their order.
void append_row(const std::vector<std::uint8_t>& row, int sketch, bool sm90,
                std::vector<std::uint8_t>& rows) {
  std::vector<std::uint8_t> ordered = row;
  for (int d = 0; sm90 && d < static_cast<int>(row.size()); ++d) {
    ordered[cuda::score::sketch_position(sketch, d)] = row[d];
  }
  rows.insert(rows.end(), ordered.begin(), ordered.end());
}

std::vector<std::uint32_t> bits_of(const std::vector<float>& values) {
  std::vector<std::uint32_t> bits;
  for (const float value : values) {
    bits.push_back(std::bit_cast<std::uint32_t>(value));
  }
  return bits;
}

// The order is one: every place is taken once.
TEST(SketchOrder, IsAPermutation) {
  for (const int sketch : {2, 4}) {
    std::set<int> places;
    for (int d = 0; d < 128; ++d) {
      places.insert(cuda::score::sketch_position(sketch, d));
    }
    EXPECT_EQ(places.size(), 128U);
    EXPECT_EQ(*places.begin(), 0);
    EXPECT_EQ(*places.rbegin(), 127);
  }
}

TEST_F(SketchOnDevice, SmokeOperandsEqualTheHosts) {
  constexpr std::int64_t kTokens = 21;
  constexpr std::int64_t kHeads = 9;
  constexpr std::int32_t kActive = 3;
  for (const std::int64_t dim : {64, 128}) {
    for (const DType dtype : {DType::e4m3, DType::bf16, DType::f32}) {
      for (const int sketch : {2, 4}) {
        for (const auto& [routed, sm90] : {std::pair(false, false), {true, false}, {true, true}}) {
          if (sketch == 4 && dtype != DType::e4m3) {
            continue;  // rows for it stay in the dtype of q
          }
          if (sm90 && dim != 128) {
            continue;  // Hopper's kernels have D = 128
          }
          SCOPED_TRACE(testing::Message() << "D = " << dim << ", " << name_of(dtype) << ", "
                                          << sketch << " bits, routed " << routed);
          const std::vector<std::byte> q = queries_of(dtype, kTokens * kHeads, dim);
          std::vector<float> w;
          std::vector<std::int32_t> heads;
          std::vector<std::uint8_t> rounded;
          std::vector<float> scale;
          for (std::int64_t i = 0; i < kTokens * kHeads; ++i) {
            w.push_back(0.01F * static_cast<float>(i % 13) - 0.04F);
          }
          for (std::int64_t t = 0; t < kTokens; ++t) {
            const auto empty = t % 8 == 6;
            for (const int head : {1, 4, 8}) {
              heads.push_back(empty ? -1 : head - static_cast<int>(t % 2));
            }
            scale.push_back(0.5F * static_cast<float>(t));
          }
          const std::vector<std::byte> row_bytes = queries_of(DType::f32, kTokens, dim);
          const auto* rows = reinterpret_cast<const float*>(row_bytes.data());
          for (std::int64_t i = 0; i < kTokens * dim; ++i) {
            rounded.push_back(static_cast<std::uint8_t>(i * 31));
          }

          const std::int32_t head_count = routed ? kActive : static_cast<std::int32_t>(kHeads);
          std::vector<std::uint8_t> wanted_rows;
          std::vector<float> wanted_factors;
          std::vector<std::uint8_t> wanted_residual;
          std::vector<float> wanted_residual_factors;
          for (std::int64_t t = 0; t < kTokens; ++t) {
            for (std::int32_t r = 0; r < head_count; ++r) {
              const std::int32_t head = routed ? heads[t * kActive + r] : r;
              std::vector<std::uint8_t> row(static_cast<std::size_t>(dim));
              float rotated[kMaxSketchDim] = {};
              float factor = 0;
              const auto* from =
                  q.data() + (t * kHeads + head) * dim * static_cast<std::int64_t>(size_of(dtype));
              if (head >= 0 && sketch == 2) {
                rotate(from, dtype, dim, rotated);
                factor = w[t * kHeads + head] * round_to_e4m3(rotated, dim, row.data());
              } else if (head >= 0) {
                std::memcpy(row.data(), from, row.size());
                factor = w[t * kHeads + head];
              }
              append_row(row, sketch, sm90, wanted_rows);
              wanted_factors.push_back(factor);
            }
            if (routed) {
              std::vector<std::uint8_t> row(static_cast<std::size_t>(dim));
              float rotated[kMaxSketchDim] = {};
              float factor = scale[t];
              if (sketch == 2) {
                rotate(rows + t * dim, DType::f32, dim, rotated);
                factor = round_to_e4m3(rotated, dim, row.data());
              } else {
                std::copy_n(rounded.begin() + t * dim, dim, row.begin());
              }
              append_row(row, sketch, sm90, wanted_residual);
              wanted_residual_factors.push_back(factor);
            }
          }

          const Guarded<std::byte> q_there{std::span<const std::byte>(q)};
          const Guarded<float> w_there{std::span<const float>(w)};
          const Guarded<std::int32_t> heads_there{std::span<const std::int32_t>(heads)};
          const Guarded<float> residual{std::span<const float>(rows, kTokens * dim)};
          const Guarded<std::uint8_t> rounded_there{std::span<const std::uint8_t>(rounded)};
          const Guarded<float> scale_there{std::span<const float>(scale)};
          const Guarded<std::uint8_t> out(wanted_rows.size());
          const Guarded<float> factors(wanted_factors.size());
          const Guarded<std::uint8_t> residual_out(wanted_residual.size());
          const Guarded<float> residual_factors(wanted_residual_factors.size());
          const cuda::Routing routing{heads_there.data(), residual.data(), rounded_there.data(),
                                      scale_there.data()};
          cuda::score::SketchOperands operands{};
          operands.rows = out.data();
          operands.factors = factors.data();
          operands.residual = routed ? residual_out.data() : nullptr;
          operands.residual_factors = residual_factors.data();
          operands.dim = static_cast<std::int32_t>(dim);
          operands.heads = head_count;
          operands.sm90 = sm90;
          cuda::score::launch_sketch_operands(
              {q_there.data(), dtype, kTokens, kHeads, dim, kHeads * dim, dim},
              {w_there.data(), kTokens, kHeads, kHeads}, routed ? &routing : nullptr, sketch,
              operands, nullptr);
          expect_success(cudaDeviceSynchronize());
          EXPECT_EQ(out.read(), wanted_rows);
          EXPECT_EQ(residual_out.read(), wanted_residual);
          EXPECT_EQ(bits_of(factors.read()), bits_of(wanted_factors));
          EXPECT_EQ(bits_of(residual_factors.read()), bits_of(wanted_residual_factors));
        }
      }
    }
  }
}

}  // namespace
}  // namespace misa::test
