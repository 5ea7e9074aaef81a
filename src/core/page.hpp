// SPDX-License-Identifier: Apache-2.0
// The layout of one page of the key cache.
#pragma once

#include <cstdint>
#include <cstring>

#include "misa/view.hpp"

namespace misa {

// Bytes of a page without padding: 64 keys of D e4m3 elements, then their 64 fp32 scales.
constexpr std::int64_t page_bytes(std::int64_t dim) {
  return kPageSize * (dim + static_cast<std::int64_t>(sizeof(float)));
}

// Bytes from the start of a page to the scale of token i. Pages need not be aligned, so a scale is
// read and written by memcpy.
constexpr std::int64_t scale_offset(std::int64_t dim, std::int64_t i) {
  return kPageSize * dim + static_cast<std::int64_t>(sizeof(float)) * i;
}

inline float load_scale(const std::uint8_t* page, std::int64_t dim, std::int64_t i) {
  float scale = 0;
  std::memcpy(&scale, page + scale_offset(dim, i), sizeof scale);
  return scale;
}

}  // namespace misa
