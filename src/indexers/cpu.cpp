// SPDX-License-Identifier: Apache-2.0
// The indexers on the CPU. Queries are taken in chunks that fit the workspace; for a chunk each
// step is one parallel loop:
//
//  1. pool    sums of whole pages, then tiles of block means, for every sequence
//  2. route   for a query: the blocks that are kept, active heads and residual row, and from these
//             the rows that score first
//  3. score   for a query block and a key split: each page is loaded once, scored by every query
//             that sees it and offered to that query's selector of the split
//  4. select  for a query: merge its selectors, re-rank, write
//
// How queries are cut into chunks, blocks and splits never changes a result: every dot product and
// every sum over keys has an order of its own, and selection is exact.
#include "indexers/cpu.hpp"

#include <algorithm>

#include "core/arena.hpp"
#include "core/sketch.hpp"
#include "core/workspace.hpp"
#include "fused/cpu.hpp"
#include "indexers/cpu_chunk.hpp"
#include "rerank/cpu.hpp"
#include "score/cpu.hpp"
#include "select/cpu.hpp"

namespace misa::cpu {
namespace {

// Row t of an output of `width` columns; empty if the output is not wanted.
template <class T>
std::span<T> row_of(std::span<T> output, std::int64_t t, std::int64_t width) {
  return output.empty() ? output : output.subspan(t * width, width);
}

class Run {
 public:
  Run(const Kernels& kernels, const Problem& problem, const WorkspaceSpec& spec,
      const Threads& threads, const Workspace& workspace)
      : kernels_(kernels),
        problem_(problem),
        config_(problem.config),
        spec_(spec),
        threads_(threads),
        workspace_(workspace) {}

  void run() const {
    for (std::int64_t t = 0; t < problem_.q.tokens;) {
      const QueryChunk chunk = cut_chunk(problem_, spec_, workspace_, t);
      pool(chunk);
      route(chunk);
      score(chunk);
      select(chunk);
      t += std::ssize(chunk.queries);
    }
  }

 private:
  // Step 1.
  void pool(const QueryChunk& chunk) const {
    if (!spec_.has_means()) {
      return;
    }
    for (const SequenceKeys& keys : chunk.sequences) {
      if (keys.sums.computed != nullptr) {
        threads_.for_each(keys.n / kPageSize, [&](std::int64_t page, int /*thread*/) {
          sum_page(kernels_, problem_, keys.queries.first, page, kPageSize,
                   keys.sums.computed + page * spec_.dim);
        });
      }
      for (const MeanTiles& means : {keys.router_means, keys.filter_means}) {
        threads_.for_each(std::ssize(means.tiles), [&](std::int64_t i, int thread) {
          load_mean_tile(kernels_, problem_, keys.queries.first, keys.sums, keys.n, means, i,
                         workspace_.threads[thread].pool);
        });
      }
    }
  }

  // Step 2.
  void route(const QueryChunk& chunk) const {
    threads_.for_each(std::ssize(chunk.blocks), [&](std::int64_t i, int thread) {
      const QueryBlock& block = chunk.blocks[i];
      ThreadScratch& scratch = workspace_.threads[thread];
      scratch.route.samples.stride = 0;
      for (Query& query : block.queries) {
        route_query(*block.keys, query, scratch);
      }
    });
  }

  void route_query(const SequenceKeys& keys, Query& query, ThreadScratch& scratch) const {
    const Recipe& recipe = query.recipe;
    const std::span<std::int32_t> heads_out = row_of(problem_.out.heads, query.t, config_.heads);
    const std::span<float> residual_out = row_of(problem_.out.residual, query.t, spec_.dim);
    if (recipe.dense) {
      std::ranges::fill(heads_out, -1);
      std::ranges::fill(residual_out, 0.0F);
    }
    const bool reported = !heads_out.empty() || !residual_out.empty();
    const bool routed = recipe.routed && (reported || (recipe.active && query.scored));
    if (!query.scored && !routed) {
      return;
    }
    const Heads heads = load_heads(kernels_, problem_, query.t, spec_.operand, scratch.heads);
    if (query.scored && recipe.filtered) {
      const BlockMeans means = means_for(keys, query, keys.filter_means, scratch.pool);
      keep_blocks(kernels_, heads, means, config_.filter_blocks, scratch.filter, query.kept_blocks);
    }
    Routed result;
    if (routed) {
      const BlockMeans means = means_for(keys, query, keys.router_means, scratch.pool);
      const RouteQuery in{query.t, query.n, keys.n, recipe.sampled, heads, means};
      result = cpu::route(kernels_, problem_, in, scratch.route);
      std::copy_n(result.active.begin(), heads_out.size(), heads_out.begin());
      std::copy_n(result.residual.begin(), residual_out.size(), residual_out.begin());
    }
    if (query.scored) {
      query.rows = first_rows(query, heads, result);
    }
  }

  // The rows that give the query's first scores.
  QueryRows first_rows(const Query& query, const Heads& heads, const Routed& routed) const {
    const Recipe& recipe = query.recipe;
    const std::span<const std::int32_t> active =
        recipe.active ? routed.active : std::span(kEveryHead).first(heads.count);
    const std::span<const float> residual =
        recipe.residual ? routed.residual : std::span<const float>{};
    return recipe.sketched && is_rotated(config_.sketch)
               ? rotated_rows(kernels_, problem_, query.t, heads, active, residual,
                              query.row_buffers)
               : active_rows(heads, active, residual, problem_.k_dtype(), query.row_buffers);
  }

  // The block means that a query sees; none where the plan has no block size for them.
  BlockMeans means_for(const SequenceKeys& keys, const Query& query, const MeanTiles& means,
                       PoolScratch& scratch) const {
    return means.block == 0
               ? BlockMeans{}
               : block_means(kernels_, problem_, query.t, keys.sums, query.n, means, scratch);
  }

  // Step 3.
  void score(const QueryChunk& chunk) const {
    const std::int64_t splits = chunk.key_splits;
    threads_.for_each(std::ssize(chunk.blocks) * splits, [&](std::int64_t item, int thread) {
      score_pages(kernels_, problem_, chunk.blocks[item / splits].queries, {item % splits, splits},
                  spec_.operand, workspace_.threads[thread].score);
    });
  }

  // Step 4.
  void select(const QueryChunk& chunk) const {
    threads_.for_each(std::ssize(chunk.queries), [&](std::int64_t i, int thread) {
      select_query(chunk.queries[i], workspace_.threads[thread]);
    });
  }

  void select_query(const Query& query, ThreadScratch& scratch) const {
    std::span<const std::uint64_t> selection =
        query.scored ? merge(kernels_, query.selectors, query.n, scratch.score.entries)
                     : select_all(query.selectors.front(), query.n);
    if (query.recipe.reranked) {
      const Heads heads = load_heads(kernels_, problem_, query.t, spec_.operand, scratch.heads);
      Selector best{scratch.reranked, 0, spec_.reranked_capacity, config_.top_k, 0};
      rerank(kernels_, problem_, query.t, selection, heads, best, scratch.score);
      selection = merge(kernels_, {&best, 1}, query.n, scratch.score.entries);
    }
    write_row(selection, query.t, config_.top_k, problem_.out);
  }

  const Kernels& kernels_;
  const Problem& problem_;
  const IndexerConfig& config_;
  const WorkspaceSpec& spec_;
  const Threads& threads_;
  const Workspace& workspace_;
};

}  // namespace

void run(const Kernels& kernels, const Problem& problem, const WorkspaceSpec& spec,
         const Threads& threads, std::span<std::byte> memory) {
  Arena arena(memory.data(), kWorkspaceAlignment);
  const Workspace workspace(spec, arena);
  Run(kernels, problem, spec, threads, workspace).run();
}

}  // namespace misa::cpu
