// SPDX-License-Identifier: Apache-2.0
// A plan's workspace, for calls whose caller does not bring one.
#pragma once

#include <cstddef>
#include <new>
#include <span>

namespace misa {

inline constexpr std::size_t kWorkspaceAlignment = 64;  // a cache line

class OwnWorkspace {
 public:
  explicit OwnWorkspace(std::size_t bytes)
      : bytes_(bytes), data_(static_cast<std::byte*>(::operator new(bytes, kAlignment))) {}
  ~OwnWorkspace() { ::operator delete(data_, kAlignment); }
  OwnWorkspace(const OwnWorkspace&) = delete;
  OwnWorkspace& operator=(const OwnWorkspace&) = delete;

  [[nodiscard]] std::span<std::byte> span() const { return {data_, bytes_}; }

 private:
  static constexpr std::align_val_t kAlignment{kWorkspaceAlignment};

  std::size_t bytes_;
  std::byte* data_;
};

}  // namespace misa
