// Memory for a plan.
#pragma once

#include <cstddef>
#include <new>
#include <span>

namespace misa::test {

class Workspace {
 public:
  explicit Workspace(std::size_t bytes)
      : bytes_(bytes), data_(static_cast<std::byte*>(::operator new(bytes, kAlignment))) {}
  Workspace(const Workspace&) = delete;
  Workspace& operator=(const Workspace&) = delete;
  ~Workspace() { ::operator delete(data_, kAlignment); }

  [[nodiscard]] std::span<std::byte> span() const { return {data_, bytes_}; }

 private:
  static constexpr std::align_val_t kAlignment{64};

  std::size_t bytes_;
  std::byte* data_;
};

}  // namespace misa::test
