// SPDX-License-Identifier: Apache-2.0
// Rows of scores on which selectors fail, and inputs that have exactly these scores.
#pragma once

#include <cstdint>
#include <span>
#include <string_view>
#include <vector>

#include "support/inputs.hpp"

namespace misa::test {

struct ScoreRow {
  std::string_view name;
  std::vector<float> (*make)(std::int64_t n, std::int64_t top_k);
  bool finite = true;
};

std::span<const ScoreRow> adversarial_rows();

// Two heads, q = ±e_0 with w = ±1 and keys v e_0: score = max(0, v) - max(0, -v) = v, exactly, in
// every dtype of keys that holds v. e4m3 keys are ±1 with scale |v|, so they hold every finite v.
// The last `queries` positions have queries.
Pack pack_with_scores(std::span<const float> scores, std::int64_t queries, DType k_dtype);

}  // namespace misa::test
