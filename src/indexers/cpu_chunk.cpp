// SPDX-License-Identifier: Apache-2.0
#include "indexers/cpu_chunk.hpp"
#include "core/ceil_div.hpp"

#include <algorithm>

namespace misa::cpu {
namespace {

// Queries that share a loaded page. Loading costs about as much as scoring one query by 8 heads, so
// 64 make it a few percent; their rows (8 heads x 128 x 2 bytes each) stay in the L2 cache.
constexpr std::int64_t kMaxBlockQueries = 64;

void start_query(const Problem& problem, std::int64_t t, Query& query) {
  const IndexerConfig& config = problem.config;
  query.t = t;
  query.n = problem.visible(t);
  query.recipe = recipe_of(config, problem.q.heads, query.n);
  query.scored = query.n > config.top_k || (query.n > 0 && !problem.out.scores.empty());
}

// Memory for a sequence's block means, after what other sequences use.
void place_means(const Problem& problem, const WorkspaceSpec& spec, const Workspace& workspace,
                 const MeanCounts& used, const MeanCounts& counts, SequenceKeys& keys) {
  const bool has_pages = counts.page_sums > 0;
  if (!has_pages || problem.page_sum(keys.queries.first, 0) == nullptr) {
    keys.sums.computed = workspace.page_sums.data() + used.page_sums * spec.dim;
  }
  keys.router_means = {spec.router_block,
                       workspace.router_tiles.subspan(used.router_tiles, counts.router_tiles)};
  keys.filter_means = {spec.filter_block,
                       workspace.filter_tiles.subspan(used.filter_tiles, counts.filter_tiles)};
}

}  // namespace

QueryChunk cut_chunk(const Problem& problem, const WorkspaceSpec& spec, const Workspace& workspace,
                     std::int64_t first) {
  const std::int64_t limit = std::min(problem.q.tokens, first + spec.chunk_queries);
  std::int64_t count = 0;
  std::int64_t sequence_count = 0;
  MeanCounts used;
  while (first + count < limit) {
    SequenceKeys keys{};
    keys.queries = problem.sequence_at(first + count, limit);
    for (std::int64_t i = 0; i < keys.queries.queries; ++i) {
      Query& query = workspace.queries[count + i];
      start_query(problem, keys.queries.first + i, query);
      keys.n = std::max(keys.n, query.recipe.dense ? 0 : query.n);
    }
    const MeanCounts counts = spec.means_of_sequence(keys.n);
    if (sequence_count > 0 && !(used + counts).fits(spec.chunk_means)) {
      break;
    }
    place_means(problem, spec, workspace, used, counts, keys);
    workspace.sequences[sequence_count++] = keys;
    used = used + counts;
    count += keys.queries.queries;
  }

  QueryChunk chunk{};
  chunk.queries = workspace.queries.first(count);
  chunk.sequences = workspace.sequences.first(sequence_count);
  chunk.key_splits = std::clamp<std::int64_t>(spec.chunk_selectors / count, 1, spec.threads);
  for (std::int64_t i = 0; i < count; ++i) {
    Query& query = chunk.queries[i];
    query.selectors = workspace.selectors.subspan(i * chunk.key_splits, chunk.key_splits);
    for (Selector& selector : query.selectors) {
      selector = {selector.entries, 0, spec.capacity, std::min(query.recipe.keep, query.n), 0};
    }
  }

  const std::int64_t block_queries =
      std::clamp<std::int64_t>(ceil_div(count, 2 * spec.threads), 1, kMaxBlockQueries);
  std::int64_t block_count = 0;
  for (const SequenceKeys& keys : chunk.sequences) {
    const std::span<Query> queries =
        chunk.queries.subspan(keys.queries.first - first, keys.queries.queries);
    for (std::int64_t i = 0; i < std::ssize(queries); i += block_queries) {
      const std::int64_t size = std::min(block_queries, std::ssize(queries) - i);
      workspace.blocks[block_count++] = {&keys, queries.subspan(i, size)};
    }
  }
  chunk.blocks = workspace.blocks.first(block_count);
  return chunk;
}

}  // namespace misa::cpu
