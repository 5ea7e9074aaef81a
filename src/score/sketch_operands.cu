// SPDX-License-Identifier: Apache-2.0
// A warp per row. A lane has D/32 consecutive elements of it.
#include "score/sketch_operands.hpp"

#include <cuda_runtime.h>

#include <limits>

#include "core/ceil_div.hpp"
#include "core/sketch.hpp"
#include "cuda/convert.cuh"
#include "cuda/hadamard.cuh"
#include "cuda/launch.cuh"
#include "score/sketch_order.hpp"

namespace misa::cuda::score {
namespace {

constexpr int kWarps = 4;

struct Arguments {
  Queries q;
  Weights w;
  Routing routing;
  bool routed;
  int sketch;
  SketchOperands out;
};

// Rotates elements of a row in fp32.
template <int count>
__device__ void rotate_floats(float (&row)[count]) {
  warp_hadamard(row);
#pragma unroll
  for (float& value : row) {
    value *= hadamard_unit(32 * count);
  }
}

// Rotates elements of an e4m3 row in exact integers.
template <int count>
__device__ void rotate_e4m3(const std::uint8_t* elements, float (&out)[count]) {
  std::int32_t fixed[count];
  bool nan = false;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    fixed[i] = e4m3_to_fixed(elements[i]);
    nan = nan || is_e4m3_nan(elements[i]);
  }
  warp_hadamard(fixed);
  nan = __any_sync(kFullMask, nan);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    out[i] = nan ? std::numeric_limits<float>::quiet_NaN()
                 : static_cast<float>(fixed[i]) * kE4m3Unit * hadamard_unit(32 * count);
  }
}

// misa::round_to_e4m3 of a warp's row; returns the scale.
template <int count>
__device__ float round_row(const float (&row)[count], std::uint8_t (&out)[count]) {
  constexpr std::uint32_t kInfinity = 0x7F800000;
  // The bits of nonnegative floats have the order of the floats; NaN is above all of them.
  std::uint32_t largest = 0;
#pragma unroll
  for (const float value : row) {
    largest = max(largest, __float_as_uint(value) & 0x7FFFFFFFU);
  }
  largest = __reduce_max_sync(kFullMask, largest);
  const bool finite = largest < kInfinity;
  const float scale = finite ? __uint_as_float(largest) / kE4m3Max : 1.0F;
#pragma unroll
  for (int i = 0; i < count; ++i) {
    constexpr std::uint8_t kNaN = 0x7F;
    out[i] = !finite ? kNaN : scale > 0 ? float_to_e4m3(row[i] / scale) : std::uint8_t{0};
  }
  return scale;
}

// A lane's elements of the row of a head of query t, and the row's factor.
template <int count>
__device__ float head_row(const Arguments& arguments, std::int64_t t, std::int32_t head, int d,
                          std::uint8_t (&row)[count]) {
  const auto& [q, w, routing, routed, sketch, out] = arguments;
  const std::int64_t at = t * q.token_stride + head * q.head_stride + d;
  const auto* const bytes = static_cast<const std::uint8_t*>(q.data) + at;
  const float weight = w.data[t * w.token_stride + head];
  if (!is_rotated(sketch)) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      row[i] = bytes[i];
    }
    return weight;
  }
  float values[count];
  if (q.dtype == DType::e4m3) {
    rotate_e4m3(bytes, values);
  } else {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      values[i] = element(q.data, q.dtype, at + i);
    }
    rotate_floats(values);
  }
  return weight * round_row(values, row);
}

// The same of the residual row.
template <int count>
__device__ float residual_row(const Arguments& arguments, std::int64_t t, int d,
                              std::uint8_t (&row)[count]) {
  const Routing& routing = arguments.routing;
  const std::int64_t at = t * count * 32 + d;
  if (!is_rotated(arguments.sketch)) {
#pragma unroll
    for (int i = 0; i < count; ++i) {
      row[i] = routing.rounded[at + i];
    }
    return routing.rounded_scale[t];
  }
  float values[count];
#pragma unroll
  for (int i = 0; i < count; ++i) {
    values[i] = routing.residual[at + i];
  }
  rotate_floats(values);
  return round_row(values, row);
}

template <int kDim>
__global__ void __launch_bounds__(kWarps * 32)
    sketch_operands_kernel(const __grid_constant__ Arguments arguments) {
  begin_kernel();
  constexpr int kElements = kDim / 32;
  const SketchOperands& out = arguments.out;
  const std::int64_t t = blockIdx.x;
  const auto r = static_cast<std::int32_t>(blockIdx.y * kWarps + threadIdx.x / 32);
  if (r > out.heads || (r == out.heads && out.residual == nullptr)) {
    return;
  }
  const int d = static_cast<int>(threadIdx.x) % 32 * kElements;
  std::uint8_t elements[kElements] = {};
  float factor = 0;
  if (r == out.heads) {
    factor = residual_row(arguments, t, d, elements);
  } else {
    const std::int32_t head = arguments.routed ? arguments.routing.heads[t * out.heads + r] : r;
    if (is_head(arguments.q, head)) {
      factor = head_row(arguments, t, head, d, elements);
    }
  }
  const bool is_residual = r == out.heads;
  std::uint8_t* const row =
      is_residual ? out.residual + t * kDim : out.rows + (t * out.heads + r) * kDim;
#pragma unroll
  for (int i = 0; i < kElements; ++i) {
    row[out.sm90 ? sketch_position(arguments.sketch, d + i) : d + i] = elements[i];
  }
  if (d == 0) {
    (is_residual ? out.residual_factors[t] : out.factors[t * out.heads + r]) = factor;
  }
}

}  // namespace

void launch_sketch_operands(const Queries& q, const Weights& w, const Routing* routing, int sketch,
                            const SketchOperands& operands, void* stream) {
  const dim3 grid(static_cast<unsigned>(q.tokens),
                  static_cast<unsigned>(ceil_div(operands.heads + 1, kWarps)));
  launch_kernel(
      "sketch operands",
      q.dim == kMaxSketchDim ? sketch_operands_kernel<kMaxSketchDim> : sketch_operands_kernel<64>,
      grid, kWarps * 32, 0, stream,
      Arguments{q, w, routing != nullptr ? *routing : Routing{}, routing != nullptr, sketch,
                operands});
}

}  // namespace misa::cuda::score
