// SPDX-License-Identifier: Apache-2.0
// One query and the keys that it sees, in double precision: the input of the reference's stages.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "core/problem.hpp"
#include "core/sketch.hpp"

namespace misa::reference {

struct Row {
  std::int64_t heads = 0;   // H
  std::int64_t dim = 0;     // D
  std::int64_t length = 0;  // n
  std::vector<double> q;    // [H, D]
  std::vector<double> w;    // [H]
  std::vector<double> k;    // [n, D]

  [[nodiscard]] std::span<const double> query(std::int64_t j) const {
    return std::span(q).subspan(static_cast<std::size_t>(j * dim), static_cast<std::size_t>(dim));
  }
  [[nodiscard]] std::span<const double> key(std::int64_t position) const {
    return std::span(k).subspan(static_cast<std::size_t>(position * dim),
                                static_cast<std::size_t>(dim));
  }
};

inline Row load_row(const Problem& problem, std::int64_t t) {
  Row row;
  row.heads = problem.q.heads;
  row.dim = problem.q.dim;
  row.length = problem.visible(t);
  for (std::int64_t j = 0; j < row.heads; ++j) {
    for (std::int64_t d = 0; d < row.dim; ++d) {
      row.q.push_back(element(problem.query(t, j), problem.q.dtype, d));
    }
    row.w.push_back(problem.weight(t, j));
  }
  row.k.reserve(static_cast<std::size_t>(row.length * row.dim));
  for (std::int64_t position = 0; position < row.length; ++position) {
    const Key key = problem.key(t, position);
    for (std::int64_t d = 0; d < row.dim; ++d) {
      row.k.push_back(double{key.scale} * element(key.data, problem.k_dtype(), d));
    }
  }
  return row;
}

// The row with the keys' sketch in place of the keys. For a rotated sketch, the heads are rotated
// and rounded too, and their scales are folded into the weights.
inline Row load_sketched_row(const Problem& problem, std::int64_t t) {
  Row row = load_row(problem, t);
  const int sketch = problem.config.sketch;
  for (std::int64_t position = 0; position < row.length; ++position) {
    const Key key = problem.key(t, position);
    std::uint16_t elements[kMaxSketchDim];
    const double factor = sketched_key(sketch, reinterpret_cast<const std::uint8_t*>(key.data),
                                       key.scale, row.dim, elements);
    for (std::int64_t d = 0; d < row.dim; ++d) {
      row.k[position * row.dim + d] = factor * bf16_to_float(elements[d]);
    }
  }
  for (std::int64_t j = 0; is_rotated(sketch) && j < row.heads; ++j) {
    float rotated[kMaxSketchDim];
    std::uint8_t rounded[kMaxSketchDim];
    rotate(problem.query(t, j), problem.q.dtype, row.dim, rotated);
    row.w[j] = problem.weight(t, j) * round_to_e4m3(rotated, row.dim, rounded);
    for (std::int64_t d = 0; d < row.dim; ++d) {
      row.q[j * row.dim + d] = e4m3_to_float(rounded[d]);
    }
  }
  return row;
}

inline double dot(std::span<const double> a, std::span<const double> b) {
  double sum = 0;
  for (std::size_t d = 0; d < a.size(); ++d) {
    sum += a[d] * b[d];
  }
  return sum;
}

// max(0, x); NaN stays NaN.
inline double relu(double x) { return x < 0 ? 0 : x; }

}  // namespace misa::reference
