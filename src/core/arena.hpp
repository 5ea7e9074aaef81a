// SPDX-License-Identifier: Apache-2.0
// Lays out the arrays of a workspace.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

namespace misa {

// Hands out consecutive arrays of one buffer. Without a buffer (a null `base`) it only counts the
// bytes that the arrays would take.
class Arena {
 public:
  // Every array starts on a multiple of `alignment` bytes, as the buffer itself does.
  Arena(std::byte* base, std::size_t alignment) : base_(base), alignment_(alignment) {}

  template <class T>
  T* take(std::int64_t count) {
    const std::size_t at = used_;
    const std::size_t bytes = sizeof(T) * static_cast<std::size_t>(count);
    used_ += (bytes + alignment_ - 1) / alignment_ * alignment_;
    return counting() ? nullptr : reinterpret_cast<T*>(base_ + at);
  }

  // The span has `count` elements even without a buffer; its data is then null.
  template <class T>
  std::span<T> take_span(std::int64_t count) {
    return {take<T>(count), static_cast<std::size_t>(count)};
  }

  [[nodiscard]] std::size_t used() const { return used_; }
  [[nodiscard]] bool counting() const { return base_ == nullptr; }

 private:
  std::byte* base_;
  std::size_t alignment_;
  std::size_t used_ = 0;
};

}  // namespace misa
