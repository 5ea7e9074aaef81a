// Whether rows may be read 16 bytes at a time.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"

namespace misa::cuda {

inline bool is_aligned(const void* data, DType dtype, std::int64_t stride) {
  constexpr std::uintptr_t kBytes = 16;
  return reinterpret_cast<std::uintptr_t>(data) % kBytes == 0 &&
         static_cast<std::uintptr_t>(stride) * size_of(dtype) % kBytes == 0;
}

inline bool is_aligned(const Keys& k) { return is_aligned(k.data, k.dtype, k.stride); }

inline bool is_aligned(const Queries& q) {
  return is_aligned(q.data, q.dtype, q.token_stride) && is_aligned(q.data, q.dtype, q.head_stride);
}

}  // namespace misa::cuda
