// SPDX-License-Identifier: Apache-2.0
// The format of a key in memory: its elements and its scale. Sizes are computed from bits, since
// elements may be smaller than a byte.
#pragma once

#include <cstdint>

#include "misa/types.hpp"

namespace misa {

enum class KeyScale : std::uint8_t {
  none,
  fp32,  // one per key
};

struct KeyFormat {
  DType element;
  KeyScale scale;

  // Bytes of the D elements, without the scale.
  [[nodiscard]] constexpr std::int64_t element_bytes(std::int64_t dim) const {
    return dim * bits_of(element) / 8;
  }
  // Bytes of the scale of one key.
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
