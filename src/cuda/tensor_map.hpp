// SPDX-License-Identifier: Apache-2.0
// TMA descriptors of keys.
#pragma once

#include <cuda.h>

#include <array>
#include <cstddef>

namespace misa::cuda {

// The descriptor of an array of bytes with `rank` dimensions, innermost first. strides[i] is in
// bytes and belongs to dimension i + 1. Boxes are swizzled as wgmma expects (ptx/wgmma.cuh), so
// box[0] is 128. Throws Error if the driver refuses.
template <std::size_t rank>
CUtensorMap tensor_map(const void* data, const std::array<cuuint64_t, rank>& sizes,
                       const std::array<cuuint64_t, rank - 1>& strides,
                       const std::array<cuuint32_t, rank>& box);

extern template CUtensorMap tensor_map<2>(const void*, const std::array<cuuint64_t, 2>&,
                                          const std::array<cuuint64_t, 1>&,
                                          const std::array<cuuint32_t, 2>&);
extern template CUtensorMap tensor_map<3>(const void*, const std::array<cuuint64_t, 3>&,
                                          const std::array<cuuint64_t, 2>&,
                                          const std::array<cuuint32_t, 3>&);

}  // namespace misa::cuda
