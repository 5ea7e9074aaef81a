// SPDX-License-Identifier: Apache-2.0
// The block-mean table, as the kernels of routing and of the block filter read it.
#pragma once

#include <cstdint>

namespace misa::cuda {

// Means of the key blocks of every sequence, in a workspace. A sequence is identified by its first
// key, and its blocks are counted from there; base_row (block_means.cuh) gives its rows. Sequences
// that do not overlap share no row. Where they overlap, a row holds the block of the sequence that
// starts last, and a kernel that needs the block of another sequence computes its mean from the
// keys. The rows of paged keys are those of the blocks that exist, so that no two sequences share
// one and tables need no room for the longest sequences of a plan. In a table of given means
// (pool/given.hpp), whose `starts` is null, every row holds the block of whichever sequence looks
// it up.
struct BlockMeanTable {
  std::int32_t* bases;         // [sequences] of paged keys: the first row of each; or null
  std::int32_t* starts;        // [capacity] first key of a row's sequence; -1: the row is empty
  float* factors;              // [capacity] a mean is the sum of its parts times this
  std::uint16_t* rows;         // [capacity, parts, D] in operand order (elements.cuh)
  float* partial;              // [T, D] mean of the keys after a query's last whole block; or null
  std::int32_t capacity;       // rows
  std::int32_t block;          // keys, a multiple of the group size
  std::int32_t dim;            // D
  std::int32_t sequence_bits;  // of paged keys (DevicePagedSource)
  bool fp16;  // a mean is two parts in fp16 (e4m3 keys and queries), else three in bf16
};

}  // namespace misa::cuda
