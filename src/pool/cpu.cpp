// SPDX-License-Identifier: Apache-2.0
#include "pool/cpu.hpp"

#include <algorithm>

#include "cpu/load.hpp"

namespace misa::cpu {
namespace {

// mean[D] of the keys first … last - 1 of query t's sequence: whole pages in order, then the keys
// before `last` in its page. `first` is a multiple of 64.
void mean_of(const Kernels& kernels, const Problem& problem, std::int64_t t, PageSums sums,
             std::int64_t first, std::int64_t last, float* mean) {
  const int dim = static_cast<int>(problem.q.dim);
  std::fill_n(mean, dim, 0.0F);
  const std::int64_t last_page = last / kPageSize;
  for (std::int64_t page = first / kPageSize; page < last_page; ++page) {
    kernels.add(sums.at(problem, t, page), dim, mean);
  }
  if (const int rest = static_cast<int>(last % kPageSize); rest > 0) {
    alignas(64) float sum[128];
    sum_page(kernels, problem, t, last_page, rest, sum);
    kernels.add(sum, dim, mean);
  }
  const auto count = static_cast<float>(last - first);
  for (int d = 0; d < dim; ++d) {
    mean[d] /= count;
  }
}

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

PoolScratch take_pool_scratch(Arena& arena, std::int64_t dim) {
  return {arena.take<float>(kPageSize * dim), take_tile(arena, Operand::f32, dim)};
}

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

void load_mean_tile(const Kernels& kernels, const Problem& problem, std::int64_t t, PageSums sums,
                    std::int64_t n, const MeanTiles& means, std::int64_t i,
                    const PoolScratch& scratch) {
  const int dim = static_cast<int>(problem.q.dim);
  const int count = valid_in_tile(static_cast<std::size_t>(i), n / means.block);
  for (int lane = 0; lane < count; ++lane) {
    const std::int64_t first = (i * kPageSize + lane) * means.block;
    mean_of(kernels, problem, t, sums, first, first + means.block,
            scratch.means + static_cast<std::int64_t>(lane) * dim);
  }
  pack_means(kernels, scratch.means, count, dim, means.tiles[i]);
}

BlockMeans block_means(const Kernels& kernels, const Problem& problem, std::int64_t t,
                       PageSums sums, std::int64_t n, const MeanTiles& means,
                       PoolScratch& scratch) {
  const std::int64_t whole = n / means.block;
  const std::int64_t tiles = (whole + kPageSize - 1) / kPageSize;
  BlockMeans visible{means.tiles.first(static_cast<std::size_t>(tiles)), whole, nullptr};
  if (n % means.block != 0) {
    mean_of(kernels, problem, t, sums, whole * means.block, n, scratch.means);
    pack_means(kernels, scratch.means, 1, static_cast<int>(problem.q.dim), scratch.partial);
    visible.partial = &scratch.partial;
  }
  return visible;
}

}  // namespace misa::cpu
