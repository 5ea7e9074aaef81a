// SPDX-License-Identifier: Apache-2.0
// The partial block mean of a query (BlockMeanTable::partial) as an operand row.
#pragma once

#include <cstdint>

#include "cuda/block_means.cuh"
#include "cuda/convert.cuh"
#include "cuda/heads.cuh"

namespace misa::cuda {

// The first of the four elements that a lane holds. Where D = 64, both halves of a warp hold the
// same.
template <int dim>
__device__ inline int partial_mean_element() {
  return static_cast<int>(threadIdx.x) % 32 * 4 % dim;
}

template <int dim>
__device__ inline float4 load_partial_mean(const BlockMeanTable& means, std::int64_t t) {
  return *reinterpret_cast<const float4*>(means.partial + t * dim + partial_mean_element<dim>());
}

// Stores a mean that the lanes of a warp have loaded as an operand row, parts `stride` elements
// apart; returns its factor, which is not 0.
template <bool fp16, int dim>
__device__ float store_partial_mean(float4 elements, std::uint16_t* row, int stride) {
  const float mean[4] = {elements.x, elements.y, elements.z, elements.w};
  float scale = 1;
  if constexpr (fp16) {
    float largest = 0;
#pragma unroll
    for (const float element : mean) {
      largest = fmaxf(largest, fabsf(element));
    }
    // fp16_scale expects the largest scale of e4m3 keys. It gets the scale with which the largest
    // e4m3 value would equal the largest element of the mean. The bits of nonnegative floats have
    // the order of the floats.
    scale = fp16_scale(__reduce_max_sync(kFullMask, __float_as_uint(largest / kE4m3Max)));
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    store_mean<fp16>(mean[e], scale, partial_mean_element<dim>() + e, dim, row, stride);
  }
  return 1 / scale;
}

}  // namespace misa::cuda
