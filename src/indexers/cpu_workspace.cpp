// SPDX-License-Identifier: Apache-2.0
#include "indexers/cpu_workspace.hpp"

#include <fmt/format.h>

#include <algorithm>
#include <memory>
#include <numeric>

#include "core/ceil_div.hpp"
#include "core/workspace.hpp"
#include "misa/error.hpp"
#include "score/cpu.hpp"

namespace misa::cpu {
namespace {

// A chunk of so many queries gives every thread several blocks; more would only take memory.
constexpr std::int64_t kMaxChunkQueries = 1024;

// Page sums of one chunk may take this much, or what one sequence needs if that is more.
constexpr std::int64_t kPageSumBytes = std::int64_t{32} << 20;

Operand operand_for(const Kernels& kernels, const Shape& shape) {
  const bool bf16 = shape.q_dtype != DType::f32 && shape.k_dtype != DType::f32;
  return kernels.native_bf16 && bf16 ? Operand::bf16 : Operand::f32;
}

// Entries of a selector that keeps the best `keep` of up to `max_keys`.
std::int64_t selector_capacity(std::int64_t keep, std::int64_t max_keys) {
  const std::int64_t kept = std::min(keep, max_keys);
  // Twice what is kept: k appends pay for a compaction of 2k entries.
  return std::min(2 * kept, max_keys) + 2 * kSelectorSlack;
}

std::int64_t most_rows(const IndexerConfig& config, const Recipe& largest, std::int64_t heads) {
  const std::int64_t active =
      largest.active ? config.heads + (largest.residual ? kMaxResidualRows : 0) : 0;
  // All heads score rows that are dense, and rows so short that every key is a candidate.
  const bool all = !largest.active || config.candidates > 0 || dense_keys(config, heads) > 0;
  return std::max(active, all ? heads : 0);
}

// `count` objects; none while counting.
template <class T>
std::span<T> take_objects(Arena& arena, std::int64_t count) {
  const std::span<T> objects = arena.take_span<T>(count);
  if (arena.counting()) {
    return {};
  }
  std::uninitialized_value_construct(objects.begin(), objects.end());
  return objects;
}

// `count` objects with memory of their own, each made by make().
template <class T, class Make>
std::span<T> make_objects(Arena& arena, std::int64_t count, const Make& make) {
  const std::span<T> objects = take_objects<T>(arena, count);
  for (std::int64_t i = 0; i < count; ++i) {
    const T object = make();
    if (!arena.counting()) {
      objects[i] = object;
    }
  }
  return objects;
}

ThreadScratch take_thread_scratch(const WorkspaceSpec& spec, Arena& arena) {
  ThreadScratch scratch{};
  scratch.score.pack = arena.take<std::byte>(kPageSize * spec.dim *
                                             static_cast<std::int64_t>(size_of(spec.operand)));
  scratch.score.tile = take_tile(arena, spec.operand, spec.dim);
  scratch.score.entries = arena.take<std::uint64_t>(spec.capacity);
  if (spec.largest.sketched) {
    scratch.score.sketch = arena.take<std::uint16_t>(kPageSize * spec.dim);
  }
  scratch.heads = take_head_buffers(arena, spec.operand, spec.heads, spec.dim, spec.has_means());
  if (spec.has_means()) {
    scratch.pool = take_pool_scratch(arena, spec.dim);
  }
  if (spec.largest.filtered) {
    scratch.filter = take_filter_scratch(arena, spec.max_blocks);
  }
  if (spec.largest.routed) {
    scratch.route = take_route_scratch(arena, spec.router, spec.largest.sampled, spec.operand,
                                       spec.heads, spec.dim, scratch.score.pack);
  }
  if (spec.largest.reranked) {
    scratch.reranked = arena.take<std::uint64_t>(spec.reranked_capacity);
  }
  return scratch;
}

Query take_query(const WorkspaceSpec& spec, Arena& arena) {
  const auto element = static_cast<std::int64_t>(size_of(spec.operand));
  Query query{};
  query.row_buffers = {arena.take<std::byte>(spec.query_rows * spec.dim * element),
                       arena.take<float>(spec.query_rows), arena.take<float>(spec.query_rows)};
  query.kept_blocks = arena.take_span<std::uint64_t>(ceil_div(spec.max_blocks, 64));
  return query;
}

}  // namespace

WorkspaceSpec::WorkspaceSpec(const IndexerConfig& config, const Shape& shape,
                             const Kernels& kernels, std::int64_t thread_count,
                             std::int64_t queries)
    : largest(largest_recipe(config, shape.heads, shape.max_keys)),
      router(config.router),
      heads(shape.heads),
      dim(shape.dim),
      operand(operand_for(kernels, shape)),
      threads(thread_count),
      chunk_queries(queries) {
  const std::int64_t max_keys = std::max<std::int64_t>(1, shape.max_keys);
  const bool pooled = largest.routed && traits_of(router).keys == RouterKeys::block_means;
  router_block = pooled ? config.block : 0;
  filter_block = largest.filtered ? config.filter_block : 0;
  max_blocks = largest.filtered ? ceil_div(max_keys, filter_block) : 0;
  query_rows = most_rows(config, largest, heads);
  capacity = selector_capacity(largest.keep, max_keys);
  reranked_capacity = selector_capacity(config.top_k, max_keys);
  chunk_selectors = std::max(queries, 2 * threads);

  // At least what the longest sequence takes, and page sums of others as far as their limit allows.
  chunk_means = means_of_sequence(max_keys);
  const std::int64_t sum_bytes = dim * static_cast<std::int64_t>(sizeof(float));
  const std::int64_t page_sums = std::max(
      chunk_means.page_sums, std::min(kPageSumBytes / sum_bytes, chunk_means.page_sums * queries));
  chunk_means.page_sums = page_sums;
  // One tile per 64 whole blocks of these pages, and a tile per sequence that is not full.
  const auto more_tiles = [&](std::int64_t block) {
    return block > 0 ? page_sums * kPageSize / block / kPageSize + queries : 0;
  };
  chunk_means.router_tiles += more_tiles(router_block);
  chunk_means.filter_tiles += more_tiles(filter_block);
}

MeanCounts WorkspaceSpec::means_of_sequence(std::int64_t n) const {
  const auto tiles = [&](std::int64_t block) {
    return block > 0 ? ceil_div(n / block, kPageSize) : 0;
  };
  return {has_means() ? n / kPageSize : 0, tiles(router_block), tiles(filter_block)};
}

WorkspaceSpec plan_workspace(const IndexerConfig& config, const Shape& shape,
                             const Kernels& kernels, const Context::State& context) {
  const auto spec = [&](std::int64_t queries) {
    return WorkspaceSpec(config, shape, kernels, context.threads.count(), queries);
  };
  const std::size_t least = bytes_of(spec(1));
  if (least > context.workspace_cap) {
    throw Error(ErrorCode::workspace,
                fmt::format("workspace cap: expected at least {} bytes for this shape, got {}",
                            least, context.workspace_cap));
  }
  std::int64_t fits = 1;
  std::int64_t too_many = std::clamp<std::int64_t>(shape.tokens, 1, kMaxChunkQueries) + 1;
  while (too_many - fits > 1) {
    const std::int64_t middle = std::midpoint(fits, too_many);
    (bytes_of(spec(middle)) <= context.workspace_cap ? fits : too_many) = middle;
  }
  return spec(fits);
}

std::size_t bytes_of(const WorkspaceSpec& spec) {
  Arena arena(nullptr, kWorkspaceAlignment);
  const Workspace counted(spec, arena);
  return arena.used();
}

Workspace::Workspace(const WorkspaceSpec& spec, Arena& arena) {
  threads = make_objects<ThreadScratch>(arena, spec.threads,
                                        [&] { return take_thread_scratch(spec, arena); });
  sequences = take_objects<SequenceKeys>(arena, spec.chunk_queries);
  blocks = take_objects<QueryBlock>(arena, spec.chunk_queries);
  queries = make_objects<Query>(arena, spec.chunk_queries, [&] { return take_query(spec, arena); });
  selectors = make_objects<Selector>(arena, spec.chunk_selectors, [&] {
    return Selector{arena.take<std::uint64_t>(spec.capacity), 0, spec.capacity, 0, 0};
  });
  page_sums = arena.take_span<float>(spec.chunk_means.page_sums * spec.dim);
  const auto tile = [&] { return take_tile(arena, Operand::f32, spec.dim); };
  router_tiles = make_objects<Tile>(arena, spec.chunk_means.router_tiles, tile);
  filter_tiles = make_objects<Tile>(arena, spec.chunk_means.filter_tiles, tile);
}

}  // namespace misa::cpu
