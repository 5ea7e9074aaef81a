// SPDX-License-Identifier: Apache-2.0
// Where a key lies and which keys a query sees. Loaders take the source as a template parameter.
// Ranges are clamped, so that reads stay in bounds whatever the arrays hold.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/problem.hpp"

namespace misa::cuda {

// The keys that a query sees, of all keys of the source.
struct Range {
  std::int32_t start;   // 0 <= start, start + length <= L
  std::int32_t length;  // n >= 0
};

__device__ inline Range visible(const DeviceRaggedSource& keys, std::int64_t t) {
  const auto tokens = static_cast<std::int32_t>(keys.tokens);
  const std::int32_t start = min(max(keys.starts[t], 0), tokens);
  const std::int32_t end = min(max(keys.ends[t], start), tokens);
  const std::int32_t length = min(end - start, keys.max_keys);
  return {start, length < keys.least_keys || length > keys.most_keys ? 0 : length};
}

// The position, among the keys that a query sees, of the key with index `token` in the source;
// modulo 2^32 for keys that it does not see.
__device__ inline std::uint32_t position_in(const Range& range, std::uint32_t token) {
  return token - range.start;
}

// Bytes from one key of a sequence to the next one.
template <DType type>
__device__ inline std::int64_t key_pitch(const DeviceRaggedSource& keys) {
  return keys.stride * static_cast<std::int64_t>(size_of(type));
}

// The elements of a key, aligned to 16 bytes.
template <DType type>
__device__ inline const std::byte* key_address(const DeviceRaggedSource& keys, std::int64_t token) {
  return static_cast<const std::byte*>(keys.data) + token * key_pitch<type>(keys);
}

// The scale of a key; 1 in formats without scales.
template <DType type>
__device__ inline float key_scale(const DeviceRaggedSource& keys, std::int64_t token) {
  return type == DType::e4m3 ? __ldg(keys.scale + token) : 1.0F;
}

}  // namespace misa::cuda
