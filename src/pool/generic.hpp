// Page sums and block means for every CUDA device of compute capability 8.0 and above.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/problem.hpp"

namespace misa::cuda::pool {

// Consecutive queries whose keys start at the same place.
struct Run {
  std::int32_t start;      // of the keys
  std::int32_t pages;      // whole pages that its longest query sees
  std::int32_t page_row;   // its first page's row in the table of page sums
  std::int32_t block_row;  // its first block's row in the table of block means
};

// The tables, in a workspace. Rows are given to runs in order until the capacity is spent.
struct Means {
  Run* runs;              // [T]
  std::int32_t* run_of;   // [T] the run of a query
  std::int32_t* counts;   // [1] runs
  float* page_sums;       // [capacity, D]
  std::uint16_t* blocks;  // [capacity / block_pages, 3, D] bf16 parts, elements in operand order
  std::int32_t capacity;
  std::int32_t block_pages;
  std::int32_t dim;  // D
  bool aligned;      // keys start on 16 bytes
};

// Enough for sequences that do not overlap and hold `total_keys` keys. With less, or with overlap
// beyond it, results stay and time grows.
std::size_t workspace_bytes(std::int64_t tokens, std::int64_t total_keys, std::int64_t dim,
                            std::int32_t block);

// Sums the whole pages and means the whole blocks of all runs. `block` is a multiple of 64.
Means launch(const Problem& problem, std::int32_t block, std::span<std::byte> workspace,
             cudaStream_t stream);

}  // namespace misa::cuda::pool
