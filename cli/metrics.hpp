// SPDX-License-Identifier: Apache-2.0
// Quality of a selection: recall and attention mass.
#pragma once

#include <cstdint>
#include <span>
#include <vector>

#include "misa/indexer.hpp"

namespace misa::cli {

// Share of the wanted positions that were selected; -1 is padding in both.
double recall(std::span<const std::int32_t> selected, std::span<const std::int32_t> wanted);

// Share of a row's attention that falls on the selected positions; attention[p] is position p's.
double attention_mass(std::span<const std::int32_t> selected, std::span<const float> attention);

// The largest share that any top_k positions can hold.
double best_attention_mass(std::span<const float> attention, std::int64_t top_k);

// The p quantile (0 <= p <= 1) of at least one value, linear between order statistics.
double quantile(std::vector<double> values, double p);

// A measure over rows.
struct Summary {
  double mean;
  double low;  // 5 % quantile
  double min;
};
Summary summarize(const std::vector<double>& values);

double mean(std::span<const double> values);

}  // namespace misa::cli
