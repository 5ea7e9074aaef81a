// SPDX-License-Identifier: Apache-2.0
#include "score/cpu.hpp"

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>

#include "core/sketch.hpp"

namespace misa::cpu {
namespace {

// The floor of a row that is not clipped.
constexpr float kLinearFloor = -std::numeric_limits<float>::infinity();

// Writes the rows whose sum is the residual row. Returns their number and sets their common weight.
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
  // Three bf16 rows hold the 24 bits of an fp32 mantissa: each takes the leading 8 bits of what
  // the rows before it left.
  auto* bf16_rows = static_cast<std::uint16_t*>(rows);
  for (std::size_t d = 0; d < dim; ++d) {
    float rest = row[d];
    for (std::size_t i = 0; i < kMaxResidualRows; ++i) {
      const auto high = static_cast<std::uint16_t>(std::bit_cast<std::uint32_t>(rest) >> 16);
      bf16_rows[i * dim + d] = high;
      rest -= bf16_to_float(high);
    }
  }
  return kMaxResidualRows;
}

}  // namespace

QueryRows active_rows(const Heads& heads, std::span<const std::int32_t> active,
                      std::span<const float> residual, DType k_dtype, const RowBuffers& buffers) {
  int count = 0;
  for (const std::int32_t j : active) {
    std::copy_n(heads.rows + j * heads.row_bytes(), heads.row_bytes(),
                buffers.data + count * heads.row_bytes());
    buffers.weight[count] = heads.weight[j];
    buffers.floor[count] = 0.0F;
    ++count;
  }
  if (!residual.empty()) {
    float weight = 0;
    const int rows = split_residual(residual, k_dtype, heads.operand,
                                    buffers.data + count * heads.row_bytes(), weight);
    std::fill_n(buffers.weight + count, rows, weight);
    std::fill_n(buffers.floor + count, rows, kLinearFloor);
    count += rows;
  }
  return {buffers.data, buffers.weight, buffers.floor, count};
}

QueryRows rotated_rows(const Kernels& kernels, const Problem& problem, std::int64_t t,
                       const Heads& heads, std::span<const std::int32_t> active,
                       std::span<const float> residual, const RowBuffers& buffers) {
  float rotated[kMaxSketchDim];
  if (!residual.empty()) {
    rotate(residual.data(), DType::f32, heads.dim, rotated);
    residual = {rotated, residual.size()};
  }
  const QueryRows rows = active_rows(heads, active, residual, DType::e4m3, buffers);
  for (std::size_t i = 0; i < active.size(); ++i) {
    std::uint8_t rounded[kMaxSketchDim];
    rotate(problem.query(t, active[i]), problem.q.dtype, heads.dim, rotated);
    buffers.weight[i] *= round_to_e4m3(rotated, heads.dim, rounded);
    kernels.convert(rounded, DType::e4m3, heads.dim, heads.operand,
                    buffers.data + static_cast<std::int64_t>(i) * heads.row_bytes());
  }
  return rows;
}

}  // namespace misa::cpu
