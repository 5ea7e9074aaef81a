// SPDX-License-Identifier: Apache-2.0
#include "route/cpu.hpp"

#include <algorithm>
#include <cmath>

#include "core/recipe.hpp"

namespace misa::cpu {

void pooled_values(const Kernels& kernels, const Heads& heads, const BlockMeans& means, float* dots,
                   float* values) {
  std::fill_n(values, heads.count, 0.0F);
  const auto add = [&](const Tile& tile, int valid) {
    kernels.dots(Operand::f32, heads.rows_f32, heads.count, tile, valid, kPageSize, dots);
    kernels.add_energy(dots, kPageSize, heads.count, valid, heads.weight, values);
  };
  for (std::size_t i = 0; i < means.whole.size(); ++i) {
    add(means.whole[i], valid_in_tile(i, means.whole_count));
  }
  if (means.partial != nullptr) {
    add(*means.partial, 1);
  }
}

void self_values(const Kernels& kernels, const Heads& heads, const Tile& last, float* dots,
                 float* values) {
  kernels.dots(heads.operand, heads.rows, heads.count, last, 1, kPageSize, dots);
  for (int j = 0; j < heads.count; ++j) {
    const float x = dots[j * kPageSize];
    values[j] = heads.weight[j] * (x < 0 ? 0 : x);
  }
}

void fit_heads(const Kernels& kernels, const Heads& heads, const Samples& samples, float* dots,
               const HeadFit& fit) {
  for (std::size_t i = 0; i < samples.tiles.size(); ++i) {
    kernels.dots(heads.operand, heads.rows, heads.count, samples.tiles[i],
                 valid_in_tile(i, samples.count), kMaxSamples,
                 dots + static_cast<std::int64_t>(i) * kPageSize);
  }
  kernels.fit(dots, kMaxSamples, heads.count, samples.count, fit);
}

void nonlinearity_values(const Kernels& kernels, const Problem& problem, std::int64_t t,
                         const Heads& heads, const HeadFit& fit, float rms, float* values) {
  for (int j = 0; j < heads.count; ++j) {
    const float norm = std::sqrt(kernels.sum_squares(problem.query(t, j), problem.q.dtype, 1.0F,
                                                     static_cast<int>(problem.q.dim)));
    const float chance = kFireChance * norm * rms * (1.0F - fit.slope[j]);
    values[j] = std::abs(heads.weight[j]) * (fit.nonlinearity[j] + chance);
  }
}

void residual_row(const Kernels& kernels, const Problem& problem, std::int64_t t,
                  std::span<const std::int32_t> active, const float* slope, float* row) {
  std::fill_n(row, problem.q.dim, 0.0F);
  auto next = active.begin();
  for (std::int64_t j = 0; j < problem.q.heads; ++j) {
    if (next != active.end() && *next == j) {
      ++next;
      continue;
    }
    kernels.add_scaled(problem.weight(t, j) * slope[j], problem.query(t, j), problem.q.dtype,
                       static_cast<int>(problem.q.dim), row);
  }
}

int split_residual(std::span<const float> row, DType k_dtype, Operand operand, void* rows,
                   float& weight) {
  weight = 1.0F;
  float largest = 0;
  bool finite = true;
  for (const float value : row) {
    largest = std::max(largest, std::abs(value));
    finite = finite && std::isfinite(value);
  }
  const auto dim = row.size();
  const auto write = [&](auto value_at) {
    for (std::size_t d = 0; d < dim; ++d) {
      if (operand == Operand::f32) {
        static_cast<float*>(rows)[d] = value_at(d);
      } else {
        static_cast<std::uint16_t*>(rows)[d] = float_to_bf16(value_at(d));
      }
    }
  };
  if (k_dtype == DType::e4m3 && finite) {
    weight = largest / kE4m3Max;
    write([&](std::size_t d) {
      return weight > 0 ? e4m3_to_float(float_to_e4m3(row[d] / weight)) : 0.0F;
    });
    return 1;
  }
  if (operand == Operand::f32 || !finite) {
    write([&](std::size_t d) { return row[d]; });
    return 1;
  }
  // Three bf16 rows hold the 24 bits of an fp32 mantissa: each takes the leading 8 bits of what the
  // earlier ones left.
  auto* parts = static_cast<std::uint16_t*>(rows);
  for (std::size_t d = 0; d < dim; ++d) {
    float rest = row[d];
    for (std::size_t part = 0; part < kMaxResidualRows; ++part) {
      const auto high = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(rest) >> 16);
      parts[part * dim + d] = high;
      rest -= bf16_to_float(high);
    }
  }
  return kMaxResidualRows;
}

}  // namespace misa::cpu
