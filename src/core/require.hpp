// SPDX-License-Identifier: Apache-2.0
// Rejects arguments, with one line that names the argument, what was expected and what was passed.
#pragma once

#include <fmt/format.h>

#include <cstdint>
#include <string_view>
#include <utility>

#include "misa/error.hpp"

namespace misa {

// Throws unless the condition holds. Formats and allocates nothing if it does.
template <class... Args>
void require(bool condition, fmt::format_string<const Args&...> message, const Args&... args) {
  if (!condition) {
    throw Error(ErrorCode::invalid_argument, fmt::format(message, args...));
  }
}

// a * b + c of nonnegative numbers. Throws if it overflows, because the caller's shape is too
// large.
inline std::int64_t checked_multiply_add(std::string_view name, std::int64_t a, std::int64_t b,
                                         std::int64_t c = 0) {
  std::int64_t product = 0;
  std::int64_t sum = 0;
  require(!__builtin_mul_overflow(a, b, &product) && !__builtin_add_overflow(product, c, &sum),
          "{}: expected a size below 2^63, got {} * {} + {}", name, a, b, c);
  return sum;
}

// Throws if a pointer to `count` elements is null, unless there are none, or is not aligned.
inline void require_data(std::string_view name, const void* data, std::int64_t count,
                         std::size_t alignment) {
  require(count == 0 || data != nullptr, "{}: expected data for {} elements, got null", name,
          count);
  require(reinterpret_cast<std::uintptr_t>(data) % alignment == 0,
          "{}: expected data aligned to {} bytes, got {}", name, alignment, data);
}

}  // namespace misa
