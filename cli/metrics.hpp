// SPDX-License-Identifier: Apache-2.0
// What a selection is worth and what it costs: recall, attention mass, counted work and time.
#pragma once

#include <cstdint>
#include <functional>
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

// A figure over rows.
struct Summary {
  double mean;
  double low;  // 5 % quantile
  double min;
};
Summary summarize(const std::vector<double>& values);

double mean(std::span<const double> values);

// What an indexer has to do for one query that sees n keys, each stage's share counted: routing,
// block filter, first stage, re-rank. Rows of n <= top_k cost nothing.
struct Work {
  double dots = 0;   // keys x heads: dot products of D
  double bytes = 0;  // keys, block means and candidates read
};
Work work_of(const IndexerConfig& config, const Shape& shape, std::int64_t n);

// Seconds a run takes.
struct Timing {
  double median = 0;
  double fastest = 0;
  double slowest = 0;
  int runs = 0;
};

// Times `runs` runs after one that is not counted, which touches the memory for the first time.
Timing measure(int runs, const std::function<void()>& run);

}  // namespace misa::cli
