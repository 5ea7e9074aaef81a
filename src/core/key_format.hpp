// SPDX-License-Identifier: Apache-2.0
// How a key stands in memory: its elements and its scales. Sizes are asked of the format, in bits,
// for elements may be smaller than a byte.
#pragma once

#include <cstdint>

#include "misa/types.hpp"

namespace misa {

enum class KeyScale : std::uint8_t {
  none,
  fp32,  // one a key
};

struct KeyFormat {
  DType element;
  KeyScale scale;

  // Of the D elements alone.
  [[nodiscard]] constexpr std::int64_t element_bytes(std::int64_t dim) const {
    return dim * bits_of(element) / 8;
  }
  // Of the scales of one key.
  [[nodiscard]] constexpr std::int64_t scale_bytes() const {
    return scale == KeyScale::fp32 ? static_cast<std::int64_t>(sizeof(float)) : 0;
  }
  [[nodiscard]] constexpr std::int64_t key_bytes(std::int64_t dim) const {
    return element_bytes(dim) + scale_bytes();
  }

 private:
  static constexpr std::int64_t bits_of(DType element) {
    return 8 * static_cast<std::int64_t>(size_of(element));
  }
};

// The format of keys of a dtype.
constexpr KeyFormat format_of(DType dtype) {
  return {dtype, dtype == DType::e4m3 ? KeyScale::fp32 : KeyScale::none};
}

}  // namespace misa
