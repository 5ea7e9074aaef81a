// SPDX-License-Identifier: Apache-2.0
#include "metrics.hpp"

#include <algorithm>
#include <chrono>
#include <cmath>
#include <functional>
#include <iterator>
#include <numeric>

namespace misa::cli {
namespace {

std::vector<std::int32_t> sorted_positions(std::span<const std::int32_t> row) {
  std::vector<std::int32_t> positions;
  std::copy_if(row.begin(), row.end(), std::back_inserter(positions),
               [](std::int32_t position) { return position >= 0; });
  std::sort(positions.begin(), positions.end());
  return positions;
}

std::int64_t blocks_of(std::int64_t n, std::int64_t block) { return (n + block - 1) / block; }

// How many keys the grid of the sampling routers holds: every s-th, s the smallest power of two
// with s >= n / 128.
std::int64_t sampled_keys(std::int64_t n) {
  std::int64_t stride = 1;
  while (stride * 128 < n) {
    stride *= 2;
  }
  return blocks_of(n, stride);
}

}  // namespace

double recall(std::span<const std::int32_t> selected, std::span<const std::int32_t> wanted) {
  const auto have = sorted_positions(selected);
  const auto want = sorted_positions(wanted);
  std::vector<std::int32_t> common;
  std::set_intersection(have.begin(), have.end(), want.begin(), want.end(),
                        std::back_inserter(common));
  return want.empty() ? 1.0 : static_cast<double>(common.size()) / static_cast<double>(want.size());
}

double attention_mass(std::span<const std::int32_t> selected, std::span<const float> attention) {
  const double total = std::accumulate(attention.begin(), attention.end(), 0.0);
  double kept = 0;
  for (const std::int32_t position : selected) {
    if (position >= 0) {
      kept += attention[static_cast<std::size_t>(position)];
    }
  }
  return total > 0 ? kept / total : 0;
}

double best_attention_mass(std::span<const float> attention, std::int64_t top_k) {
  std::vector<float> sorted(attention.begin(), attention.end());
  std::sort(sorted.begin(), sorted.end(), std::greater<>());
  const auto kept = std::min<std::ptrdiff_t>(top_k, std::ssize(sorted));
  const double total = std::accumulate(sorted.begin(), sorted.end(), 0.0);
  return total > 0 ? std::accumulate(sorted.begin(), sorted.begin() + kept, 0.0) / total : 0;
}

double quantile(std::vector<double> values, double p) {
  std::sort(values.begin(), values.end());
  const double at = p * static_cast<double>(values.size() - 1);
  const auto below = static_cast<std::size_t>(at);
  const std::size_t above = std::min(below + 1, values.size() - 1);
  return std::lerp(values[below], values[above], at - static_cast<double>(below));
}

double mean(std::span<const double> values) {
  return std::accumulate(values.begin(), values.end(), 0.0) / static_cast<double>(values.size());
}

Summary summarize(const std::vector<double>& values) {
  return {mean(values), quantile(values, 0.05), quantile(values, 0)};
}

Work work_of(const IndexerConfig& config, const Shape& shape, std::int64_t n) {
  Work work;
  if (n <= config.top_k) {
    return work;
  }
  const double key_bytes =
      static_cast<double>(shape.dim) * static_cast<double>(size_of(shape.k_dtype)) +
      (shape.k_dtype == DType::e4m3 ? sizeof(float) : 0);
  const double mean_bytes = static_cast<double>(shape.dim) * sizeof(float);
  const auto read = [&](std::int64_t keys, std::int64_t heads, double bytes) {
    work.dots += static_cast<double>(keys) * static_cast<double>(heads);
    work.bytes += static_cast<double>(keys) * bytes;
  };

  const bool all_heads = config.takes_every_head(shape.heads, n);
  std::int64_t kept = n;
  if (!all_heads && config.filter_block > 0 &&
      blocks_of(n, config.filter_block) > config.filter_blocks) {
    const std::int64_t blocks = blocks_of(n, config.filter_block);
    read(blocks, shape.heads, mean_bytes);
    const std::int64_t last = n - (blocks - 1) * config.filter_block;
    kept = (config.filter_blocks - 1) * std::int64_t{config.filter_block} + last;
  }
  const bool dense = all_heads || config.router == Router::all || config.heads == shape.heads;
  if (dense || config.candidates >= kept) {
    read(kept, shape.heads, key_bytes);
    return work;
  }
  if (config.router == Router::pooled) {
    read(blocks_of(n, config.block), shape.heads, mean_bytes);
  } else if (config.router == Router::self) {
    read(1, shape.heads, key_bytes);
  }
  if (config.residual || config.router == Router::nonlinearity ||
      config.router == Router::dispersion) {
    read(sampled_keys(n), shape.heads, key_bytes);
  }
  read(kept, config.heads + (config.residual ? 1 : 0), key_bytes);
  read(config.candidates, shape.heads, key_bytes);
  return work;
}

Timing measure(int runs, const std::function<void()>& run) {
  run();
  std::vector<double> seconds;
  for (int i = 0; i < runs; ++i) {
    const auto start = std::chrono::steady_clock::now();
    run();
    seconds.push_back(
        std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count());
  }
  return {quantile(seconds, 0.5), quantile(seconds, 0), quantile(seconds, 1), runs};
}

}  // namespace misa::cli
