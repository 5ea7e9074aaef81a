// SPDX-License-Identifier: Apache-2.0
// A call in device memory, as every CUDA stage sees it. Host code validated the shapes; what the
// arrays hold is unknown, so kernels clamp whatever they use as an index.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "misa/view.hpp"

namespace misa::cuda {

// Bytes that device memory is aligned to, and so every array of a workspace.
inline constexpr std::size_t kDeviceAlignment = 256;

// Ragged keys k [L, D] and the range that each query sees (cuda/key_source.cuh).
struct DeviceRaggedSource {
  const void* data;
  DType dtype;
  std::int64_t tokens;         // L
  std::int64_t stride;         // elements from one key to the next
  const float* scale;          // [L] for e4m3, else null
  const std::int32_t* starts;  // ks [T]
  const std::int32_t* ends;    // ke [T]
  std::int32_t max_keys;       // no query sees more; rows that would are cut there
  // A pass computes only queries that see this many keys, once they are cut; it treats all others
  // as empty.
  std::int32_t least_keys = 0;
  std::int32_t most_keys = std::numeric_limits<std::int32_t>::max();
};

// Queries and weights have their strides resolved. A chunk of a call is a Problem whose pointers
// are moved and whose q.tokens is the chunk's.
struct Problem {
  Queries q;
  Weights w;
  DeviceRaggedSource k;
};

// Queries first … first + count - 1 of a problem.
inline Problem chunk_of(Problem problem, std::int64_t first, std::int64_t count) {
  problem.q.data =
      static_cast<const std::byte*>(problem.q.data) +
      first * problem.q.token_stride * static_cast<std::int64_t>(size_of(problem.q.dtype));
  problem.w.data += first * problem.w.token_stride;
  problem.k.starts += first;
  problem.k.ends += first;
  problem.q.tokens = problem.w.tokens = count;
  return problem;
}

// What scores for a query: routed heads, and the row that stands for the others.
struct Routing {
  std::int32_t* heads;    // [T, h] ascending; -1 for empty rows
  float* residual;        // [T, D] before rounding; 0 for empty rows; null: no residual row
  std::uint8_t* rounded;  // [T, D] e4m3, where keys are e4m3: residual = rounded * scale
  float* rounded_scale;   // [T]
};

// Which positions the columns of a matrix of scores stand for: column c is position c; or, with a
// list, position list[t, c / block] * block + c % block of query t.
struct Columns {
  const std::int32_t* list;  // [T, width] ascending, -1 behind them; null: no list
  std::int32_t width;
  std::int32_t block;
};

// Scores [T, columns].
struct Scores {
  float* data;
  std::int64_t columns;
};

// A key and its score, as scoring hands it to selection; one 8-byte store.
struct alignas(8) Candidate {
  float score;
  std::uint32_t key;  // its index in the source; position_in (key_source.cuh) counts from a query's
                      // first key. Scoring has no register for that: 3 % of a step.
};

// The candidates of each query, in lists that one writer each fills: [T, lists, capacity] entries
// and [T, lists] counts. A count above the capacity says that entries were lost.
struct Candidates {
  Candidate* entries;
  std::uint32_t* counts;
  std::uint32_t lists;
  std::uint32_t capacity;
};

}  // namespace misa::cuda
