// SPDX-License-Identifier: Apache-2.0
// The mean of the block that a query stands in, of what it sees of it, as an operand.
#pragma once

#include <cstdint>

#include "cuda/block_means.cuh"
#include "cuda/convert.cuh"
#include "cuda/heads.cuh"

namespace misa::cuda {

// A lane's elements. Where D = 64 both halves of a warp hold the same.
template <int dim>
__device__ inline int partial_place() {
  return static_cast<int>(threadIdx.x) % 32 * 4 % dim;
}

template <int dim>
__device__ inline float4 load_partial_mean(const BlockMeans& means, std::int64_t t) {
  return *reinterpret_cast<const float4*>(means.own + t * dim + partial_place<dim>());
}

// Stores what a warp's lanes loaded as an operand row, `stride` elements from part to part; returns
// its factor, which is not 0.
template <bool fp16, int dim>
__device__ float store_partial_mean(float4 four, std::uint16_t* row, int stride) {
  const float mean[4] = {four.x, four.y, four.z, four.w};
  float scale = 1;
  if constexpr (fp16) {
    float largest = 0;
#pragma unroll
    for (const float element : mean) {
      largest = fmaxf(largest, fabsf(element));
    }
    // As if it were a key's largest. Floats of one sign have the order of their bits.
    scale = fp16_scale(__reduce_max_sync(kFullMask, __float_as_uint(largest / kE4m3Max)));
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    store_mean<fp16>(mean[e], scale, partial_place<dim>() + e, dim, row, stride);
  }
  return 1 / scale;
}

}  // namespace misa::cuda
