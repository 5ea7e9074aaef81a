// SPDX-License-Identifier: Apache-2.0
// Block means for every CUDA device of compute capability 8.0 and above.
#pragma once

#include <cuda_runtime_api.h>

#include <cstddef>
#include <cstdint>
#include <span>

#include "cuda/problem.hpp"
#include "misa/indexer.hpp"

namespace misa::cuda::pool {

// Block means in a workspace. Block b of the sequence that starts at key s has row s / block + b:
// sequences that do not overlap share no row. Where sequences overlap, a row holds the block of the
// one that starts last, and says so; who wants another one sums its keys himself.
struct Means {
  std::int32_t* starts;   // [capacity] where a row's sequence starts; -1: the row is empty
  float* factors;         // [capacity] a mean is the sum of its parts times this
  std::uint16_t* blocks;  // [capacity, parts, D] in operand order
  float* own;  // [T, D] mean of what a query sees of the block that it stands in; or null
  std::int32_t capacity;
  std::int32_t block;  // positions, a multiple of the page size
  std::int32_t dim;    // D
  bool fp16;           // a mean is two parts in fp16 (e4m3 keys and queries), else three in bf16
};

// Enough for sequences that do not overlap and hold `total_keys` keys. With less, or with overlap,
// results stay and time grows. `own` says that queries' own means are wanted.
std::size_t workspace_bytes(const Shape& shape, std::int64_t total_keys, std::int32_t block,
                            bool own);

// Means all whole blocks that a query of `problem` sees, and the queries' own ones.
Means launch(const Problem& problem, std::int32_t block, bool own, std::span<std::byte> workspace,
             cudaStream_t stream);

}  // namespace misa::cuda::pool
