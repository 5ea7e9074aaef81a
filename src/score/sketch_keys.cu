// SPDX-License-Identifier: Apache-2.0
// A warp per key.
#include "score/sketch_keys.hpp"

#include <cuda_runtime.h>

#include "core/ceil_div.hpp"
#include "core/sketch.hpp"
#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/sketch.cuh"

namespace misa::cuda::score {
namespace {

constexpr int kWarps = 8;

template <int kDim>
__global__ void __launch_bounds__(kWarps * 32)
    sketch_keys_kernel(const DeviceRaggedSource keys, int sketch, std::uint8_t* out) {
  begin_kernel();
  const std::int64_t token = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (token >= keys.tokens) {
    return;
  }
  const auto* elements =
      reinterpret_cast<const std::uint8_t*>(key_address<DType::e4m3>(keys, token));
  encode_sketch<kDim / 32>(sketch, elements, key_scale<DType::e4m3>(keys, token),
                           out + sketch_code_offset(sketch, kDim, token),
                           out + sketch_scale_offset(sketch, kDim, keys.tokens, token));
}

}  // namespace

void launch_sketches(const DeviceRaggedSource& keys, int sketch, std::int64_t dim,
                     std::uint8_t* out, void* stream) {
  if (keys.tokens == 0) {
    return;
  }
  launch_kernel("sketches of keys",
                dim == kMaxSketchDim ? sketch_keys_kernel<kMaxSketchDim> : sketch_keys_kernel<64>,
                dim3(static_cast<unsigned>(ceil_div(keys.tokens, kWarps))), kWarps * 32, 0, stream,
                keys, sketch, out);
}

}  // namespace misa::cuda::score
