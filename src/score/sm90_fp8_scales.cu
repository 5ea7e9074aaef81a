// SPDX-License-Identifier: Apache-2.0
// Scales for scoring: one that is not finite becomes NaN, so that every score of its key is NaN.
#include <cuda_runtime.h>

#include <limits>

#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "score/sm90_fp8.hpp"

namespace misa::cuda::score {
namespace {

constexpr int kThreads = static_cast<int>(kScaleTile);  // one per scale

__global__ void __launch_bounds__(kThreads)
    scales_kernel(const DeviceRaggedSource keys, float* scales) {
  begin_kernel();
  constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();
  const std::int64_t key = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  const float scale = key < keys.tokens ? key_scale<DType::e4m3>(keys, key) : kNaN;
  scales[key] = isfinite(scale) ? scale : kNaN;
}

}  // namespace

void launch_scales(const DeviceRaggedSource& keys, float* scales, void* stream) {
  if (keys.tokens == 0) {
    return;
  }
  const auto blocks = static_cast<unsigned>(scale_count(keys.tokens) / kThreads);
  launch_kernel("scales", scales_kernel, dim3(blocks), kThreads, 0, stream, keys, scales);
}

}  // namespace misa::cuda::score
