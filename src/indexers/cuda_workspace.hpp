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
#include "score/sm90_sketch_keys.hpp"
#include "select/gate.hpp"

namespace misa::cuda {

// Which kernels a pass uses, from the config and shapes alone. Every row is computed by the recipe
// of the longest row, by which a shorter row selects the same keys as by its own.
struct PassSpec {
  Recipe recipe;         // of the longest row
  int sketch;            // bits of the sketch that gives the first scores, or 0
  bool sm90_scores;      // the first scores come from Hopper's kernels for e4m3
  bool fused;            // and the same kernel applies the gate to them (ragged keys only)
  bool sm90_rerank;      // the scores of the candidates come from Hopper's kernels
  std::int32_t heads;    // that give the first scores
  std::int32_t keep;     // the most keys that the first selection keeps
  std::int64_t columns;  // of the matrix of first scores

  PassSpec(const IndexerConfig& config, const Shape& shape, bool paged, const DeviceTraits& device);

  // How many rows give a query's first scores: heads and, if there is one, the residual row.
  [[nodiscard]] std::int32_t rows() const { return heads + (recipe.residual ? 1 : 0); }

  // What Hopper's kernels need of all ragged keys of a call: their scales, and what their sketches
  // stand for.
  [[nodiscard]] bool needs_scales(bool paged) const {
    return !paged && (sm90_rerank || (sm90_scores && sketch == 0));
  }
  [[nodiscard]] bool needs_sketch_keys(bool paged) const {
    return !paged && sm90_scores && sketch != 0;
  }
};

// The memory of fused scoring, for the largest chunk of a plan, and the work plan of the current
// chunk.
struct FusedWorkspace {
  fused::WorkPlan work_plan{};
  std::span<float> samples;
  float* thresholds = nullptr;
  Candidates candidates{};
  std::span<std::uint32_t> counts;
  select::FallbackRows fallback{};
  // Scores of fallback rows, in the memory of the candidates, which is free once their top k are
  // selected.
  std::span<float> fallback_scores;

  FusedWorkspace() = default;
  FusedWorkspace(const PassSpec& spec, const Shape& chunk, std::int64_t total_keys,
                 const DeviceTraits& device, Arena& arena);

  // Uses the best work plan for this chunk of a call with `total_keys` keys if there is room for
  // it, else the planned one.
  void fit(const PassSpec& spec, Shape chunk, std::int64_t total_keys, const DeviceTraits& device);
};

// The workspace of a chunk of queries.
struct ChunkWorkspace {
  Routing routing{};
  std::int32_t* blocks = nullptr;  // [T, filter_blocks] that the filter keeps
  std::span<std::byte> route_means;
  std::span<std::byte> filter;
  std::span<std::byte> filter_means;
  float* scales = nullptr;           // of all ragged keys of a call (score::launch_scales)
  std::uint8_t* sketches = nullptr;  // of all ragged keys of a call (score::launch_sketches)
  FusedWorkspace fused;
  score::SketchOperands sketch_rows{};  // for a rotated sketch, or Hopper's kernels
  score::SketchKeys sketch_keys{};      // of all ragged keys of a call, for Hopper's kernels
  score::RowOperands rows{};
  score::RowOperands all_rows{};
  Scores scores{};
  std::int32_t* lengths = nullptr;
  std::int32_t* candidates = nullptr;
  Scores candidate_scores{};
  std::int32_t* candidate_lengths = nullptr;
  std::int32_t* indices = nullptr;  // used if the caller requests none

  ChunkWorkspace(const IndexerConfig& config, const Shape& chunk, const KeyBounds& keys,
                 const DeviceTraits& device, std::byte* memory);

  std::size_t bytes = 0;
};

}  // namespace misa::cuda
