// SPDX-License-Identifier: Apache-2.0
// The layout of one page of the key cache.
#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

#include "core/key_format.hpp"
#include "misa/view.hpp"

namespace misa {

// The format of the keys in a page.
constexpr KeyFormat page_format() { return format_of(DType::e4m3); }

// A page has 2^page_bits tokens.
inline int page_bits(std::int64_t page_size) {
  return std::countr_zero(static_cast<std::uint64_t>(page_size));
}

// Groups of a page, each with a sum of its own.
constexpr std::int64_t groups_of(std::int64_t page_size) { return page_size / kGroupSize; }

// Bytes of a page without padding: the elements of its keys, then their scales.
constexpr std::int64_t page_bytes(std::int64_t dim, std::int64_t page_size) {
  return page_size * page_format().key_bytes(dim);
}

// Bytes from the start of a page to the scale of token i. Pages need not be aligned, so a scale is
// read and written by memcpy.
constexpr std::int64_t scale_offset(std::int64_t dim, std::int64_t page_size, std::int64_t i) {
  return page_size * page_format().element_bytes(dim) + page_format().scale_bytes() * i;
}

inline float load_scale(const std::uint8_t* page, std::int64_t dim, std::int64_t page_size,
                        std::int64_t i) {
  float scale = 0;
  std::memcpy(&scale, page + scale_offset(dim, page_size, i), sizeof scale);
  return scale;
}

}  // namespace misa
