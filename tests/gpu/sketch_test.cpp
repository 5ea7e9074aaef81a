// SPDX-License-Identifier: Apache-2.0
// Sketches of keys on a device: the operands of their queries.
#include "core/sketch.hpp"

#include <bit>
#include <cmath>
#include <limits>
#include <random>
#include <vector>

#include "common.hpp"
#include "core/problem.hpp"
#include "score/sketch_operands.hpp"

namespace misa::test {
namespace {

constexpr float kInf = std::numeric_limits<float>::infinity();
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

class SketchOnDevice : public ::testing::Test {
 protected:
  void SetUp() override {
    int count = 0;
    if (cudaGetDeviceCount(&count) != cudaSuccess || count == 0) {
      GTEST_SKIP() << "no device";
    }
  }
};

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

TEST_F(SketchOnDevice, SmokeOperandsEqualTheHosts) {
  constexpr std::int64_t kTokens = 21;
  constexpr std::int64_t kHeads = 9;
  constexpr std::int32_t kActive = 3;
  for (const std::int64_t dim : {64, 128}) {
    for (const DType dtype : {DType::e4m3, DType::bf16, DType::f32}) {
      for (const int sketch : {2, 4}) {
        for (const bool routed : {false, true}) {
          if (sketch == 4 && dtype != DType::e4m3) {
            continue;  // rows for it stay in the dtype of q
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

          const std::int32_t count = routed ? kActive + 1 : static_cast<std::int32_t>(kHeads);
          std::vector<std::uint8_t> wanted_rows;
          std::vector<float> wanted_factors;
          for (std::int64_t t = 0; t < kTokens; ++t) {
            for (std::int32_t r = 0; r < count; ++r) {
              const bool residual = routed && r == kActive;
              const std::int32_t head = residual ? -1 : routed ? heads[t * kActive + r] : r;
              std::vector<std::uint8_t> row(static_cast<std::size_t>(dim));
              float rotated[kMaxSketchDim] = {};
              float factor = 0;
              const auto* from =
                  q.data() + (t * kHeads + head) * dim * static_cast<std::int64_t>(size_of(dtype));
              if (residual && sketch == 2) {
                rotate(rows + t * dim, DType::f32, dim, rotated);
                factor = round_to_e4m3(rotated, dim, row.data());
              } else if (residual) {
                std::copy_n(rounded.begin() + t * dim, dim, row.begin());
                factor = scale[t];
              } else if (head >= 0 && sketch == 2) {
                rotate(from, dtype, dim, rotated);
                factor = w[t * kHeads + head] * round_to_e4m3(rotated, dim, row.data());
              } else if (head >= 0) {
                std::memcpy(row.data(), from, row.size());
                factor = w[t * kHeads + head];
              }
              wanted_rows.insert(wanted_rows.end(), row.begin(), row.end());
              wanted_factors.push_back(factor);
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
          const cuda::Routing routing{heads_there.data(), residual.data(), rounded_there.data(),
                                      scale_there.data()};
          const std::int32_t head_count = routed ? kActive : static_cast<std::int32_t>(kHeads);
          cuda::score::launch_sketch_operands(
              {q_there.data(), dtype, kTokens, kHeads, dim, kHeads * dim, dim},
              {w_there.data(), kTokens, kHeads, kHeads}, routed ? &routing : nullptr, sketch,
              {out.data(), factors.data(), static_cast<std::int32_t>(dim), head_count, routed},
              nullptr);
          expect_success(cudaDeviceSynchronize());
          EXPECT_EQ(out.read(), wanted_rows);
          const std::vector<float> got = factors.read();
          for (std::size_t i = 0; i < got.size(); ++i) {
            EXPECT_EQ(std::bit_cast<std::uint32_t>(got[i]),
                      std::bit_cast<std::uint32_t>(wanted_factors[i]))
                << "row " << i;
          }
        }
      }
    }
  }
}

}  // namespace
}  // namespace misa::test
