// SPDX-License-Identifier: Apache-2.0
// What a pass over queries does on a device, and the memory that one chunk of them takes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/arena.hpp"
#include "core/recipe.hpp"
#include "cuda/problem.hpp"
#include "cuda/target.hpp"
#include "fused/work_plan.hpp"
#include "misa/indexer.hpp"
#include "score/generic.hpp"
#include "select/gate.hpp"

namespace misa::cuda {

// Which kernels a pass takes, from shapes alone. Every row takes the largest one's recipe: a row
// with fewer keys selects the same by it.
struct PassSpec {
  Recipe recipe;         // of the longest row
  bool sm90_scores;      // the first scores come from Hopper's kernels for e4m3
  bool fused;            // and pass the gate of selection as they are made
  bool sm90_rerank;      // the scores of the candidates come from Hopper's kernels
  std::int32_t heads;    // of the first scores
  std::int32_t keep;     // of them
  std::int64_t columns;  // of a matrix of first scores

  PassSpec(const IndexerConfig& config, const Shape& shape, const DeviceTraits& device);

  // What scores first for a query: heads and, with one, the residual row.
  [[nodiscard]] std::int32_t rows() const { return heads + (recipe.residual ? 1 : 0); }
};

// What fused scoring keeps: room for the largest chunk of a plan, and the work plan of the chunk at
// hand.
struct FusedWorkspace {
  fused::WorkPlan work_plan{};
  std::span<float> samples;
  float* thresholds = nullptr;
  Candidates candidates{};
  std::span<std::uint32_t> counts;
  select::FallbackRows fallback{};
  // The memory of the candidates, free once the best of them are chosen: scores of fallback rows.
  std::span<float> fallback_scores;

  FusedWorkspace() = default;
  FusedWorkspace(const PassSpec& spec, const Shape& chunk, std::int64_t total_keys,
                 const DeviceTraits& device, Arena& arena);

  // Takes the work plan that suits this chunk of a call with `total_keys` keys best if there is
  // room for it, else the planned one.
  void fit(const PassSpec& spec, Shape chunk, std::int64_t total_keys, const DeviceTraits& device);
};

// The workspace of a chunk of queries.
struct ChunkWorkspace {
  Routing routing{};
  std::int32_t* blocks = nullptr;  // [T, filter_blocks] that the filter keeps
  std::span<std::byte> route_means;
  std::span<std::byte> filter;
  std::span<std::byte> filter_means;
  float* scales = nullptr;  // of all keys of a call (score::launch_scales)
  FusedWorkspace fused;
  score::RowOperands rows{};
  score::RowOperands all_rows{};
  Scores scores{};
  std::int32_t* lengths = nullptr;
  std::int32_t* candidates = nullptr;
  Scores candidate_scores{};
  std::int32_t* candidate_lengths = nullptr;
  std::int32_t* indices = nullptr;  // where the caller wants none

  ChunkWorkspace(const IndexerConfig& config, const Shape& chunk, std::int64_t total_keys,
                 const DeviceTraits& device, std::byte* memory);

  std::size_t bytes = 0;
};

}  // namespace misa::cuda
