// SPDX-License-Identifier: Apache-2.0
// A warp per key: its lanes encode the key as they would for a cache, and write what the codes
// stand for.
#include "score/sm90_sketch_keys.hpp"

#include <cuda_runtime.h>

#include <limits>

#include "core/sketch.hpp"
#include "cuda/convert.cuh"
#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/sketch.cuh"
#include "cuda/sm90.hpp"
#include "score/sketch_order.hpp"
#include "score/sm90_fp8.hpp"

namespace misa::cuda::score {
namespace {

constexpr int kWarps = 8;
constexpr int kLaneElements = kDim / 32;

struct Encoded {
  std::uint8_t codes[sketch_code_bytes(4, kDim)];
  std::uint8_t scales[sketch_scale_bytes(4, kDim)];
};

__global__ void __launch_bounds__(kWarps * 32)
    sketch_keys_kernel(const DeviceRaggedSource keys, int sketch, const SketchKeys out) {
  begin_kernel();
  __shared__ Encoded shared[kWarps];
  const std::int64_t key = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (key >= keys.tokens) {
    if (lane == 0 && key < scale_count(keys.tokens)) {
      out.scales[key] = std::numeric_limits<float>::quiet_NaN();
    }
    return;
  }
  Encoded& encoded = shared[threadIdx.x / 32];
  encode_sketch<kLaneElements>(
      sketch, reinterpret_cast<const std::uint8_t*>(key_address<DType::e4m3>(keys, key)),
      key_scale<DType::e4m3>(keys, key), encoded.codes, encoded.scales);
  __syncwarp();
  float factor = 0;
  float values[kLaneElements];
  if (is_rotated(sketch)) {
    factor = fp16_to_float(static_cast<std::uint16_t>(encoded.scales[0] | encoded.scales[1] << 8));
    const std::uint32_t codes = encoded.codes[lane];
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      values[i] = static_cast<float>(codes >> (2 * i) & 3) - 1.5F;
    }
  } else {
    int largest = 0;
    for (const std::uint8_t exponent : encoded.scales) {
      largest = max(largest, int{exponent});
    }
    const int below = largest - encoded.scales[lane / (kSketchGroup / kLaneElements)];
    factor = ue8m0_to_float(static_cast<std::uint8_t>(largest)) * kSketchUnit;
    const float group = below > kSketchReach ? 0.0F : exp2f(static_cast<float>(-below));
#pragma unroll
    for (int i = 0; i < kLaneElements; ++i) {
      const unsigned code = encoded.codes[lane * 2 + i / 2] >> (4 * (i % 2)) & 0xFU;
      values[i] = e2m1_to_float(code) * group / kSketchUnit;
    }
  }
#pragma unroll
  for (int i = 0; i < kLaneElements; ++i) {
    out.rows[key * kDim + sketch_position(sketch, lane * kLaneElements + i)] =
        float_to_e4m3(values[i]);
  }
  if (lane == 0) {
    out.scales[key] = factor;
  }
}

}  // namespace

void launch_sketch_keys(const DeviceRaggedSource& keys, int sketch, const SketchKeys& out,
                        void* stream) {
  if (keys.tokens == 0) {
    return;
  }
  static_assert(kScaleTile % kWarps == 0);
  const auto blocks = static_cast<unsigned>(scale_count(keys.tokens) / kWarps);
  launch_kernel("sketches of keys", sketch_keys_kernel, dim3(blocks), kWarps * 32, 0, stream, keys,
                sketch, out);
}

}  // namespace misa::cuda::score
