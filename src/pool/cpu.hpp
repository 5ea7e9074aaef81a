// SPDX-License-Identifier: Apache-2.0
// Page sums and block means for the CPU backend.
#pragma once

#include <cstdint>
#include <span>

#include "core/arena.hpp"
#include "core/problem.hpp"
#include "cpu/heads.hpp"
#include "cpu/kernels.hpp"

namespace misa::cpu {

// The sums of the whole pages of one sequence: computed here if `computed` is set, else those that
// the key source keeps.
struct PageSums {
  float* computed = nullptr;  // [pages, D]

  [[nodiscard]] const float* at(const Problem& problem, std::int64_t t, std::int64_t page) const {
    return computed != nullptr ? computed + page * problem.q.dim : problem.page_sum(t, page);
  }
};

// The means of a sequence's whole blocks, for one block size.
struct MeanTiles {
  std::int64_t block;
  std::span<Tile> tiles;  // f32
};

struct PoolScratch {
  float* means;  // [64][D]
  Tile partial;  // f32
};

PoolScratch take_pool_scratch(Arena& arena, std::int64_t dim);

// sum[D] = the first `count` keys of a page of query t's sequence, in order.
void sum_page(const Kernels& kernels, const Problem& problem, std::int64_t t, std::int64_t page,
              int count, float* sum);

// Fills tile i of the means of the whole blocks among n keys of query t's sequence.
void load_mean_tile(const Kernels& kernels, const Problem& problem, std::int64_t t, PageSums sums,
                    std::int64_t n, const MeanTiles& means, std::int64_t i,
                    const PoolScratch& scratch);

// The block means of query t, which sees n keys. The mean of a partial block is in the scratch.
BlockMeans block_means(const Kernels& kernels, const Problem& problem, std::int64_t t,
                       PageSums sums, std::int64_t n, const MeanTiles& means, PoolScratch& scratch);

}  // namespace misa::cpu
