// SPDX-License-Identifier: Apache-2.0
// How a slab of queries is cut for fused scoring: host code, from shapes alone.
#pragma once

#include <cstdint>

namespace misa::cuda::fused {

struct Shape {
  std::int64_t tokens;      // queries of a slab
  std::int64_t total_keys;  // L
  std::int64_t max_keys;    // that one query sees
  int rows;                 // heads and the residual row of a query, 1 to kMaxRows
  int top_k;
  int num_sms;  // of the device
};

// How tiles of keys are dealt out to thread blocks. A kernel takes queries in blocks; each of these
// has `parts` parts of the keys, to which tiles go in turn, and a thread block scores `share`
// parts that follow each other: of one block of queries, or the last of one and the first of the
// next.
struct Deal {
  int parts;
  int share;
  int step;  // parts that follow each other are this many tiles apart; coprime to `parts`
};

struct WorkPlan {
  Deal sampled;            // of the samples' tiles; share 1
  Deal all;                // of all keys' tiles
  int lists;               // of candidates a query: thread blocks that may have a part of its keys
  std::uint32_t capacity;  // of a list
  std::int64_t sample_stride;  // every so many keys one is a sample
  std::int64_t samples;        // columns of the samples' scores
};

WorkPlan plan_work(const Shape& shape);

}  // namespace misa::cuda::fused
