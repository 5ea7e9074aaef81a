// SPDX-License-Identifier: Apache-2.0
// One validated call, as every backend gets it: default strides are replaced by actual ones, and
// keys of all sources are read through the same functions.
#pragma once

#include <cstdint>
#include <variant>

#include "core/key_source.hpp"
#include "misa/indexer.hpp"

namespace misa {

struct Problem {
  const IndexerConfig& config;
  Queries q;
  Weights w;
  KeySource keys;
  Selection out;  // of positions, whatever its slots and offsets say

  [[nodiscard]] DType k_dtype() const {
    return std::visit([](const auto& source) { return source.format().element; }, keys);
  }

  // These functions are those of the key source (core/key_source.hpp).
  [[nodiscard]] std::int64_t visible(std::int64_t t) const {
    return std::visit([&](const auto& source) { return source.visible(t); }, keys);
  }
  [[nodiscard]] Sequence sequence_at(std::int64_t t, std::int64_t end) const {
    return std::visit([&](const auto& source) { return source.sequence_at(t, end); }, keys);
  }
  [[nodiscard]] Key key(std::int64_t t, std::int64_t position) const {
    return std::visit([&](const auto& source) { return source.key(t, position); }, keys);
  }
  [[nodiscard]] const float* page_sum(std::int64_t t, std::int64_t group) const {
    return std::visit([&](const auto& source) { return source.page_sum(t, group); }, keys);
  }

  // Query head q[t, j].
  [[nodiscard]] const void* query(std::int64_t t, std::int64_t j) const {
    return static_cast<const std::byte*>(q.data) +
           (t * q.token_stride + j * q.head_stride) * static_cast<std::int64_t>(size_of(q.dtype));
  }

  [[nodiscard]] float weight(std::int64_t t, std::int64_t j) const {
    return w.data[t * w.token_stride + j];
  }
};

// Element i of a row of any dtype, unscaled.
inline float element(const void* row, DType dtype, std::int64_t i) {
  switch (dtype) {
    case DType::f32: return static_cast<const float*>(row)[i];
    case DType::bf16: return bf16_to_float(static_cast<const std::uint16_t*>(row)[i]);
    case DType::e4m3: return e4m3_to_float(static_cast<const std::uint8_t*>(row)[i]);
  }
  return 0;
}

}  // namespace misa
