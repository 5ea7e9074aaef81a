// SPDX-License-Identifier: Apache-2.0
#include "indexers/cpu_means.hpp"

#include <algorithm>
#include <numeric>
#include <vector>

#include "core/arena.hpp"
#include "core/ceil_div.hpp"
#include "core/workspace.hpp"
#include "cpu/load.hpp"
#include "filter/cpu.hpp"
#include "route/cpu.hpp"

namespace misa::cpu {
namespace {

// What one thread computes in.
struct MeansScratch {
  Tile partial;
  RouteScratch route;
  std::span<std::uint64_t> kept;  // a bit per block
  std::vector<Tile> tiles;        // of whole blocks
  HeadBuffers heads;
  FilterScratch filter;

  // For queries of up to `blocks` blocks.
  MeansScratch(const Queries& q, std::int64_t blocks, Arena& arena)
      : partial(take_tile(arena, Operand::f32, q.dim)),
        route(take_route_scratch(arena, Router::pooled, false, Operand::f32, q.heads, q.dim,
                                 nullptr)),
        kept(arena.take_span<std::uint64_t>(ceil_div(blocks, 64))),
        heads(take_head_buffers(arena, Operand::f32, q.heads, q.dim, true)),
        filter(take_filter_scratch(arena, blocks)) {
    for (std::int64_t first = 0; first < blocks; first += kPageSize) {
      tiles.push_back(take_tile(arena, Operand::f32, q.dim));
    }
  }
};

// The means of query t's blocks, in the scratch.
BlockMeans load_means(const Kernels& kernels, const MeansProblem& means, std::int64_t t,
                      MeansScratch& scratch) {
  const std::int64_t whole = means.problem.visible(t);
  const std::span tiles = std::span(scratch.tiles).first(ceil_div(whole, kPageSize));
  for (std::size_t i = 0; i < tiles.size(); ++i) {
    load_page(kernels, means.problem, t, static_cast<std::int64_t>(i) * kPageSize,
              valid_in_tile(i, whole), Operand::f32, nullptr, tiles[i]);
  }
  BlockMeans loaded{tiles, whole, nullptr};
  if (const void* partial = means.partial_mean(t)) {
    scratch.partial.dim = static_cast<int>(means.problem.q.dim);
    kernels.pack(&partial, DType::f32, 1, scratch.partial.dim, Operand::f32, nullptr,
                 scratch.partial.data);
    loaded.partial = &scratch.partial;
  }
  return loaded;
}

// Calls body(t, scratch) for every query that sees a block; the rows of the others are -1.
template <class Body>
void for_each_query(const MeansProblem& means, const Threads& threads, const Body& body) {
  const Queries& q = means.problem.q;
  std::int64_t most = 0;
  for (std::int64_t t = 0; t < q.tokens; ++t) {
    most = std::max(most, means.blocks(t));
  }
  Arena counted(nullptr, kWorkspaceAlignment);
  const MeansScratch one(q, most, counted);
  const OwnWorkspace memory(counted.used() * static_cast<std::size_t>(threads.count()));
  Arena arena(memory.span().data(), kWorkspaceAlignment);
  std::vector<MeansScratch> scratch;
  for (int thread = 0; thread < threads.count(); ++thread) {
    scratch.emplace_back(q, most, arena);
  }
  threads.for_each(q.tokens, [&](std::int64_t t, int thread) {
    if (means.blocks(t) > 0) {
      body(t, scratch[thread]);
    } else {
      std::ranges::fill(means.row(t), -1);
    }
  });
}

}  // namespace

void route_from_means(const Kernels& kernels, const MeansProblem& problem, const Threads& threads) {
  for_each_query(problem, threads, [&](std::int64_t t, MeansScratch& scratch) {
    const Heads heads = load_heads(kernels, problem.problem, t, Operand::f32, scratch.heads);
    const BlockMeans means = load_means(kernels, problem, t, scratch);
    const RouteQuery query{t, 0, 0, false, heads, means};
    std::ranges::copy(route(kernels, problem.problem, query, scratch.route).active,
                      problem.row(t).begin());
  });
}

void keep_blocks_from_means(const Kernels& kernels, const MeansProblem& problem,
                            const Threads& threads) {
  for_each_query(problem, threads, [&](std::int64_t t, MeansScratch& scratch) {
    const std::span<std::int32_t> row = problem.row(t);
    const std::int64_t blocks = problem.blocks(t);
    if (blocks <= problem.width) {
      std::iota(row.begin(), row.begin() + blocks, 0);
      std::fill(row.begin() + blocks, row.end(), -1);
      return;
    }
    const Heads heads = load_heads(kernels, problem.problem, t, Operand::f32, scratch.heads);
    keep_blocks(kernels, heads, load_means(kernels, problem, t, scratch), problem.width,
                scratch.filter, scratch.kept);
    auto out = row.begin();
    for (std::int64_t b = 0; b < blocks; ++b) {
      if ((scratch.kept[b / 64] >> (b % 64) & 1) != 0) {
        *out++ = static_cast<std::int32_t>(b);
      }
    }
  });
}

}  // namespace misa::cpu
