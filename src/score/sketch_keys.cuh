// SPDX-License-Identifier: Apache-2.0
// The sketches of the keys that a thread block scores.
#pragma once

#include <cstdint>

#include "core/sketch.hpp"
#include "cuda/key_source.cuh"
#include "cuda/sketch.cuh"
#include "cuda/warp.cuh"

namespace misa::cuda::score {

// Sketches of keys that have none in memory.
template <int kKeys>
struct alignas(16) EncodedKeys {
  std::uint8_t codes[kKeys][kMaxSketchDim / 2];
  std::uint8_t scales[kKeys][kMaxSketchDim / kSketchGroup];

  [[nodiscard]] __device__ SketchBytes at(int i) const { return {codes[i], scales[i]}; }
};

// Encodes `kKeys` keys of a warp; `key` is the index of the lane's, or -1. All lanes call.
template <class Source, int kKeys>
__device__ void encode_keys(const Source& keys, int sketch, int dim, std::int64_t key, int first,
                            EncodedKeys<kKeys>& out) {
  for (int i = 0; i < 32; ++i) {
    const std::int64_t index = __shfl_sync(kFullMask, key, i);
    if (index < 0) {
      continue;
    }
    const auto* elements =
        reinterpret_cast<const std::uint8_t*>(key_address<DType::e4m3>(keys, index));
    const float scale = key_scale<DType::e4m3>(keys, index);
    std::uint8_t* codes = out.codes[first + i];
    std::uint8_t* scales = out.scales[first + i];
    if (dim == kMaxSketchDim) {
      encode_sketch<kMaxSketchDim / 32>(sketch, elements, scale, codes, scales);
    } else {
      encode_sketch<2>(sketch, elements, scale, codes, scales);
    }
  }
  __syncwarp();
}

// The sketch of a key: as it stands in memory, or else as it was encoded as key i. Null if the
// key's page does not exist.
template <class Source, int kKeys>
__device__ SketchBytes sketch_of(const Source& keys, int sketch, int dim, std::int64_t key,
                                 const EncodedKeys<kKeys>& encoded, int i) {
  return has_sketch(keys) ? cuda::sketch_of(keys, sketch, dim, key) : encoded.at(i);
}

}  // namespace misa::cuda::score
