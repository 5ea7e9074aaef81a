// SPDX-License-Identifier: Apache-2.0
// The sketches of keys by brute force, written from docs/spec.md without the library's functions:
// the matrix entry by entry, levels by comparing exact integers, roundings by search.
#pragma once

#include <cstdint>
#include <vector>

#include "core/problem.hpp"
#include "support/tolerance.hpp"

namespace misa::test {

// What a key's sketch holds, and what it stands for: factor * value[d], exact in double.
struct SketchedKey {
  std::vector<std::uint8_t> codes;
  std::vector<std::uint8_t> scales;
  std::vector<double> value;
  double factor;  // NaN if the whole key is NaN
};
SketchedKey brute_force_sketch(int sketch, const std::uint8_t* element, float scale,
                               std::int64_t dim);

// A row times the rotation, [D] in fp32.
std::vector<float> brute_force_rotated(const void* row, DType dtype, std::int64_t dim);

// A rotated row in e4m3, and the scale that goes into its weight.
struct RoundedRow {
  std::vector<double> value;
  float scale;
};
RoundedRow brute_force_rounded(const std::vector<float>& row);

// bounded_row with what the first scores of a config with a sketch are computed from.
BoundedRow bounded_sketched_row(const Problem& problem, std::int64_t t,
                                const Arithmetic& arithmetic = {});

}  // namespace misa::test
