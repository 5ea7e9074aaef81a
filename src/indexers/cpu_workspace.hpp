// SPDX-License-Identifier: Apache-2.0
// The workspace of the CPU backend: what a plan asks for and how a run lays it out.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/arena.hpp"
#include "core/problem.hpp"
#include "core/recipe.hpp"
#include "cpu/kernels.hpp"
#include "cpu/load.hpp"
#include "cpu/query.hpp"
#include "filter/cpu.hpp"
#include "indexers/backend.hpp"
#include "pool/cpu.hpp"
#include "route/cpu.hpp"

namespace misa::cpu {

// What the block means of sequences take.
struct MeanCounts {
  std::int64_t page_sums = 0;
  std::int64_t router_tiles = 0;
  std::int64_t filter_tiles = 0;

  [[nodiscard]] MeanCounts operator+(const MeanCounts& other) const {
    return {page_sums + other.page_sums, router_tiles + other.router_tiles,
            filter_tiles + other.filter_tiles};
  }
  [[nodiscard]] bool fits(const MeanCounts& room) const {
    return page_sums <= room.page_sums && router_tiles <= room.router_tiles &&
           filter_tiles <= room.filter_tiles;
  }
};

// What a plan needs, from shapes alone.
struct WorkspaceSpec {
  // `queries`: of one query chunk.
  WorkspaceSpec(const IndexerConfig& config, const Shape& shape, const Kernels& kernels,
                std::int64_t thread_count, std::int64_t queries);

  [[nodiscard]] bool has_means() const { return router_block > 0 || filter_block > 0; }
  [[nodiscard]] MeanCounts means_of_sequence(std::int64_t n) const;

  Recipe largest;
  Router router;
  std::int64_t heads;
  std::int64_t dim;
  Operand operand;
  std::int64_t threads;
  std::int64_t router_block;       // of the means that the router looks at; 0: it looks at none
  std::int64_t filter_block;       // 0: no blocks are filtered
  std::int64_t max_blocks;         // that a query filters
  std::int64_t query_rows;         // most rows that score first for a query
  std::int64_t capacity;           // entries of a selector of the first selection
  std::int64_t reranked_capacity;  // and of the selector of a re-rank
  std::int64_t chunk_queries;
  std::int64_t chunk_selectors;
  MeanCounts chunk_means;
};

// The spec of the largest query chunk that the context's workspace cap allows. Throws Error if it
// allows none.
WorkspaceSpec plan_workspace(const IndexerConfig& config, const Shape& shape,
                             const Kernels& kernels, const Context::State& context);

std::size_t bytes_of(const WorkspaceSpec& spec);

// What one thread computes in, a part per stage.
struct ThreadScratch {
  PoolScratch pool;
  RouteScratch route;
  ScoreScratch score;
  HeadBuffers heads;
  FilterScratch filter;
  std::uint64_t* reranked;  // [reranked_capacity]
};

// The keys of consecutive queries that share them.
struct SequenceKeys {
  Sequence queries;
  std::int64_t n;  // seen by the longest of its rows that is not dense
  PageSums sums;
  MeanTiles router_means;
  MeanTiles filter_means;
};

// Queries of one sequence that share each page that is loaded.
struct QueryBlock {
  const SequenceKeys* keys;
  std::span<Query> queries;
};

// Lists have room for the largest chunk.
struct Workspace {
  Workspace(const WorkspaceSpec& spec, Arena& arena);

  std::span<ThreadScratch> threads;
  std::span<SequenceKeys> sequences;
  std::span<QueryBlock> blocks;
  std::span<Query> queries;
  std::span<Selector> selectors;
  std::span<float> page_sums;
  std::span<Tile> router_tiles;
  std::span<Tile> filter_tiles;
};

}  // namespace misa::cpu
