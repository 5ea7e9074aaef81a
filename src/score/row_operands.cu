// SPDX-License-Identifier: Apache-2.0
// The rows that the generic kernels score with.
//
// One thread block per query:
//  1. Copies each active head as an operand, with its weight.
//  2. Appends the residual row: the e4m3 row with its scale as the weight; for bf16 keys, three
//     bf16 rows whose sum is exactly the fp32 row; for f32, the row itself.
//  3. Fills the rest of the last row group with zeros.
// For a rotated sketch the rows and weights are those of the sketch operands.
#include <cuda_runtime.h>

#include <cstdint>

#include "core/sketch.hpp"
#include "cuda/convert.cuh"
#include "cuda/launch.cuh"
#include "score/generic.hpp"

namespace misa::cuda::score {
namespace {

// Three bf16 hold the 24 bits of an fp32 mantissa.
constexpr int kResidualParts = 3;

template <class Source>
struct RowOperandsArguments {
  ProblemOf<Source> problem;
  Routing routing;
  bool routed;
  RowOperands rows;
};

// Part `part` of the value of a residual row as a sum of bf16 parts: each part takes the leading 8
// bits of what the parts before it leave.
__device__ float residual_part(float value, int part) {
  if (!isfinite(value)) {
    return part == 0 ? value : 0;
  }
  float high = 0;
  for (int i = 0; i <= part; ++i) {
    high = __uint_as_float(__float_as_uint(value) & 0xFFFF0000U);
    value -= high;
  }
  return high;
}

template <class Source>
__global__ void row_operands_kernel(
    const __grid_constant__ RowOperandsArguments<Source> arguments) {
  begin_kernel();
  const auto& [problem, routing, routed, rows] = arguments;
  const std::int64_t t = blockIdx.x;
  const auto dim = static_cast<std::int32_t>(problem.q.dim);
  const std::int32_t padded = rows.padded();
  const bool e4m3 = problem.k.dtype == DType::e4m3;

  for (std::int32_t r = threadIdx.x; r < padded; r += static_cast<std::int32_t>(blockDim.x)) {
    float weight = 0;
    if (r < rows.heads) {
      const std::int32_t head = routed ? routing.heads[t * rows.heads + r] : r;
      weight = is_head(problem.q, head) ? problem.w.data[t * problem.w.token_stride + head] : 0;
    } else if (r < rows.heads + rows.linear) {
      weight = e4m3 ? routing.rounded_scale[t] : 1;
    }
    rows.weight[t * padded + r] = weight;
  }

  for (std::int32_t i = threadIdx.x; i < padded * dim; i += static_cast<std::int32_t>(blockDim.x)) {
    const std::int32_t r = i / dim;
    const std::int32_t d = i % dim;
    const std::int32_t part = r - rows.heads;
    float value = 0;
    if (part < 0) {
      const std::int32_t head = routed ? routing.heads[t * rows.heads + r] : r;
      value = is_head(problem.q, head)
                  ? element(problem.q.data, problem.q.dtype,
                            t * problem.q.token_stride + head * problem.q.head_stride + d)
                  : 0;
    } else if (part < rows.linear) {
      value = e4m3               ? e4m3_to_float(routing.rounded[t * dim + d])
              : rows.linear == 1 ? routing.residual[t * dim + d]
                                 : residual_part(routing.residual[t * dim + d], part);
    }
    const std::int64_t at = t * padded * dim + i;
    if (rows.operand == DType::f32) {
      static_cast<float*>(rows.data)[at] = value;
    } else {
      static_cast<std::uint16_t*>(rows.data)[at] = float_to_bf16(value);
    }
  }
}

__global__ void sketched_rows_kernel(const SketchOperands operands, const RowOperands rows) {
  begin_kernel();
  const std::int64_t t = blockIdx.x;
  const std::int32_t heads = operands.heads;
  const std::int32_t dim = operands.dim;
  const std::int32_t padded = rows.padded();
  for (std::int32_t r = threadIdx.x; r < padded; r += static_cast<std::int32_t>(blockDim.x)) {
    const bool is_residual = r == heads && operands.residual != nullptr;
    rows.weight[t * padded + r] = r < heads     ? operands.factors[t * heads + r]
                                  : is_residual ? operands.residual_factors[t]
                                                : 0;
  }
  for (std::int32_t i = threadIdx.x; i < padded * dim; i += static_cast<std::int32_t>(blockDim.x)) {
    const std::int32_t r = i / dim;
    const std::uint8_t* row = nullptr;
    if (r < heads) {
      row = operands.rows + (t * heads + r) * dim;
    } else if (r == heads && operands.residual != nullptr) {
      row = operands.residual + t * dim;
    }
    const float value = row != nullptr ? e4m3_to_float(row[i % dim]) : 0;
    static_cast<std::uint16_t*>(rows.data)[t * padded * dim + i] = float_to_bf16(value);
  }
}

}  // namespace

RowOperands row_operands_for(const Shape& shape, std::int32_t heads, bool residual, int sketch) {
  // Rotated rows are e4m3, whatever q is.
  const bool fp32 =
      !is_rotated(sketch) && (shape.q_dtype == DType::f32 || shape.k_dtype == DType::f32);
  const std::int32_t linear = fp32 || shape.k_dtype == DType::e4m3 ? 1 : kResidualParts;
  return {nullptr,
          nullptr,
          fp32 ? DType::f32 : DType::bf16,
          static_cast<std::int32_t>(shape.dim),
          heads,
          residual ? linear : 0};
}

template <class Source>
void launch_row_operands(const ProblemOf<Source>& problem, const Routing* routing,
                         const RowOperands& rows, void* stream) {
  constexpr int kThreads = 256;
  const RowOperandsArguments<Source> arguments{problem, routing != nullptr ? *routing : Routing{},
                                               routing != nullptr, rows};
  launch_kernel("row operands", row_operands_kernel<Source>,
                dim3(static_cast<unsigned>(problem.q.tokens)), kThreads, 0, stream, arguments);
}

void launch_row_operands(const SketchOperands& operands, std::int64_t queries,
                         const RowOperands& rows, void* stream) {
  constexpr int kThreads = 256;
  launch_kernel("row operands", sketched_rows_kernel, dim3(static_cast<unsigned>(queries)),
                kThreads, 0, stream, operands, rows);
}

template void launch_row_operands(const Problem&, const Routing*, const RowOperands&, void*);
template void launch_row_operands(const PagedProblem&, const Routing*, const RowOperands&, void*);

}  // namespace misa::cuda::score
