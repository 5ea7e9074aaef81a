// SPDX-License-Identifier: Apache-2.0
// A call in device memory, as every CUDA stage gets it. Host code has validated the shapes. The
// contents of the arrays are unknown, so kernels clamp every value that they use as an index.
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
  std::int32_t max_keys;       // longer ranges are cut to this many keys
  // A pass computes only queries that see least_keys to most_keys keys after the cut to max_keys.
  // All other queries count as seeing none.
  std::int32_t least_keys = 0;
  std::int32_t most_keys = std::numeric_limits<std::int32_t>::max();
};

// Queries and weights have actual strides, never default ones. A chunk of a call is a Problem whose
// pointers start at the chunk's first query and whose q.tokens is the chunk's.
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

// The active heads of each query, and the residual row in place of its other heads.
struct Routing {
  std::int32_t* heads;    // [T, h] ascending; -1 for empty rows
  float* residual;        // [T, D] before rounding; 0 for empty rows; null: no residual row
  std::uint8_t* rounded;  // [T, D] e4m3, where keys are e4m3: residual = rounded * scale
  float* rounded_scale;   // [T]
};

// Which positions the columns of a matrix of scores stand for: column c is position c; or, with a
// list, position list[t, c / block] * block + c % block of query t.
struct Columns {
  const std::int32_t* list;  // [T, width] ascending, then -1; null: no list
  std::int32_t width;
  std::int32_t block;
};

// Scores [T, columns].
struct Scores {
  float* data;
  std::int64_t columns;
};

// A key and its score, which scoring writes for selection in one 8-byte store.
struct alignas(8) Candidate {
  float score;
  std::uint32_t key;  // its index in the source. Selection converts it to a position (position_in):
                      // in scoring, which lacks a register, that would take 3 % of a step.
};

// The candidates of each query, in lists that are each filled by one thread block: [T, lists,
// capacity] entries and [T, lists] counts. If a count exceeds the capacity, entries were lost.
struct Candidates {
  Candidate* entries;
  std::uint32_t* counts;
  std::uint32_t lists;
  std::uint32_t capacity;
};

}  // namespace misa::cuda
