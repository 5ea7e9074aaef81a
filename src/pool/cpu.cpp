// SPDX-License-Identifier: Apache-2.0
#include "pool/cpu.hpp"

#include <algorithm>

namespace misa::cpu {
namespace {

void pack_means(const Kernels& kernels, const float* means, int count, int dim, Tile& tile) {
  const void* rows[kPageSize];
  for (int i = 0; i < count; ++i) {
    rows[i] = means + static_cast<std::int64_t>(i) * dim;
  }
  tile.dim = dim;
  tile.scaled = false;
  kernels.pack(rows, DType::f32, count, dim, Operand::f32, nullptr, tile.data);
}

}  // namespace

void sum_page(const Kernels& kernels, const Problem& problem, std::int64_t t, std::int64_t page,
              int count, float* sum) {
  const void* rows[kPageSize];
  float scale[kPageSize];
  for (int i = 0; i < count; ++i) {
    const Key key = problem.key(t, page * kPageSize + i);
    rows[i] = key.data;
    scale[i] = key.scale;
  }
  const int dim = static_cast<int>(problem.q.dim);
  std::fill_n(sum, dim, 0.0F);
  kernels.add_keys(rows, scale, problem.k_dtype(), count, dim, sum);
}

void block_mean(const Kernels& kernels, const Problem& problem, std::int64_t t, PageSums sums,
                std::int64_t first, std::int64_t last, float* mean) {
  const int dim = static_cast<int>(problem.q.dim);
  std::fill_n(mean, dim, 0.0F);
  const std::int64_t whole_end = last / kPageSize;
  for (std::int64_t page = first / kPageSize; page < whole_end; ++page) {
    kernels.add(sums.at(problem, t, page), dim, mean);
  }
  if (const int rest = static_cast<int>(last % kPageSize); rest > 0) {
    alignas(64) float part[128];
    sum_page(kernels, problem, t, whole_end, rest, part);
    kernels.add(part, dim, mean);
  }
  const auto count = static_cast<float>(last - first);
  for (int d = 0; d < dim; ++d) {
    mean[d] /= count;
  }
}

void load_mean_tile(const Kernels& kernels, const Problem& problem, std::int64_t t, PageSums sums,
                    std::int64_t block, std::int64_t first, int count, float* scratch, Tile& tile) {
  const int dim = static_cast<int>(problem.q.dim);
  for (int i = 0; i < count; ++i) {
    block_mean(kernels, problem, t, sums, (first + i) * block, (first + i + 1) * block,
               scratch + static_cast<std::int64_t>(i) * dim);
  }
  pack_means(kernels, scratch, count, dim, tile);
}

void load_partial_mean(const Kernels& kernels, const Problem& problem, std::int64_t t,
                       PageSums sums, std::int64_t block, std::int64_t n, float* scratch,
                       Tile& tile) {
  block_mean(kernels, problem, t, sums, n / block * block, n, scratch);
  pack_means(kernels, scratch, 1, static_cast<int>(problem.q.dim), tile);
}

}  // namespace misa::cpu
