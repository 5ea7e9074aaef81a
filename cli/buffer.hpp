// SPDX-License-Identifier: Apache-2.0
// Uninitialised memory, aligned to a cache line.
#pragma once

#include <cstddef>
#include <memory>
#include <new>
#include <span>

namespace misa::cli {

class Buffer {
 public:
  explicit Buffer(std::size_t bytes)
      : data_(static_cast<std::byte*>(::operator new(bytes, kAlignment))), bytes_(bytes) {}

  [[nodiscard]] std::byte* data() const { return data_.get(); }
  [[nodiscard]] std::size_t size() const { return bytes_; }
  [[nodiscard]] std::span<std::byte> span() const { return {data(), bytes_}; }

 private:
  static constexpr std::align_val_t kAlignment{64};
  struct Free {
    void operator()(std::byte* data) const { ::operator delete(data, kAlignment); }
  };

  std::unique_ptr<std::byte, Free> data_;
  std::size_t bytes_;
};

}  // namespace misa::cli
