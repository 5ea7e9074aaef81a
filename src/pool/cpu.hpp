// SPDX-License-Identifier: Apache-2.0
// Page sums and block means for the CPU backend.
#pragma once

#include <cstdint>

#include "core/problem.hpp"
#include "cpu/kernels.hpp"

namespace misa::cpu {

// The sums of whole pages of one sequence: computed for it, by logical page, or from the cache's
// sidecar, by physical page.
struct PageSums {
  const float* own = nullptr;  // [pages, D]
  const float* sidecar = nullptr;

  [[nodiscard]] const float* at(const Problem& problem, std::int64_t t, std::int64_t page) const {
    return own != nullptr ? own + page * problem.q.dim
                          : sidecar + problem.physical_page(t, page) * problem.q.dim;
  }
};

// sum[D]: of the first `count` keys of a page of query t's sequence, in order.
void sum_page(const Kernels& kernels, const Problem& problem, std::int64_t t, std::int64_t page,
              int count, float* sum);

// mean[D]: of positions first … last - 1 of query t's sequence. Whole pages are added in order,
// then the keys of a last page that is not whole. `first` is a multiple of 64.
void block_mean(const Kernels& kernels, const Problem& problem, std::int64_t t, PageSums sums,
                std::int64_t first, std::int64_t last, float* mean);

// Fills an f32 tile with the means of whole blocks first … first + count - 1. `scratch` has room
// for 64 rows of f32.
void load_mean_tile(const Kernels& kernels, const Problem& problem, std::int64_t t, PageSums sums,
                    std::int64_t block, std::int64_t first, int count, float* scratch, Tile& tile);

// Fills an f32 tile with the partial block mean of query t, which sees n keys: that of the keys
// after its last whole block.
void load_partial_mean(const Kernels& kernels, const Problem& problem, std::int64_t t,
                       PageSums sums, std::int64_t block, std::int64_t n, float* scratch,
                       Tile& tile);

}  // namespace misa::cpu
