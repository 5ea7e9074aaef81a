// SPDX-License-Identifier: Apache-2.0
// Block means as the kernels of routing and of the block filter read them.
#pragma once

#include <cstdint>

namespace misa::cuda {

// Block means in a workspace. Block b of the sequence that starts at key s has row s / block + b:
// sequences that do not overlap share no row. Where sequences overlap, a row holds the block of the
// one that starts last, and says so; a kernel that needs another sequence's block computes its
// mean from the keys.
struct BlockMeans {
  std::int32_t* starts;   // [capacity] where a row's sequence starts; -1: the row is empty
  float* factors;         // [capacity] a mean is the sum of its parts times this
  std::uint16_t* blocks;  // [capacity, parts, D] in operand order
  float* own;  // [T, D] mean of what a query sees of the block that it stands in; or null
  std::int32_t capacity;
  std::int32_t block;  // positions, a multiple of the page size
  std::int32_t dim;    // D
  bool fp16;           // a mean is two parts in fp16 (e4m3 keys and queries), else three in bf16
};

}  // namespace misa::cuda
