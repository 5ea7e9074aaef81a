// SPDX-License-Identifier: Apache-2.0
// What the sketches of ragged keys stand for, as keys that Hopper's e4m3 kernels score: their
// products have the bits of paged scoring of the same sketches (sm90_sketch_paged.cu).
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"

namespace misa::cuda::score {

struct SketchKeys {
  std::uint8_t* rows;  // [L, D] e4m3, in the order of sketch_position
  float* scales;       // [scale_count(L)]; NaN for keys that score NaN, and in the padding
};

// Encodes all keys, of 128 e4m3 elements.
void launch_sketch_keys(const DeviceRaggedSource& keys, int sketch, const SketchKeys& out,
                        void* stream);

}  // namespace misa::cuda::score
