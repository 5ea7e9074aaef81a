// SPDX-License-Identifier: Apache-2.0
// How the work of fused scoring on a chunk of queries is divided: host code, from shapes alone.
#pragma once

#include <cstdint>

namespace misa::cuda::fused {

struct WorkShape {
  std::int64_t tokens;      // queries of the chunk
  std::int64_t total_keys;  // L
  std::int64_t max_keys;    // that one query sees
  int rows;                 // heads and the residual row of a query, 1 to kMaxRows
  int top_k;
  int num_sms;  // of the device
};

// How key tiles are divided among thread blocks. Queries are scored in query blocks. For each query
// block the tiles that it sees, numbered from 0, are divided into splits: tile i belongs to the
// split s with s * stride = i modulo `splits`. The splits of all query blocks form one sequence, of
// which each thread block scores the next `per_block`. So its splits may be the last ones of a
// query block and the first ones of the next.
struct KeySplits {
  int splits;     // of a query block
  int per_block;  // consecutive splits that a thread block scores
  int stride;     // tiles from one split's first tile to the next one's; coprime to `splits`
};

struct WorkPlan {
  KeySplits sample_splits;     // of the tiles of sampled keys; one per thread block
  KeySplits key_splits;        // of the tiles of all keys
  int lists;                   // of candidates per query: one per thread block that may score it
  std::uint32_t capacity;      // entries of a list
  std::int64_t sample_stride;  // every sample_stride-th key is a sample
  std::int64_t samples;        // columns of the samples' scores
};

WorkPlan plan_work(const WorkShape& shape);

}  // namespace misa::cuda::fused
