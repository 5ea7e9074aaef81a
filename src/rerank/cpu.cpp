// SPDX-License-Identifier: Apache-2.0
#include "rerank/cpu.hpp"

#include <algorithm>

#include "cpu/load.hpp"
#include "cpu/ranking.hpp"

namespace misa::cpu {

void rerank(const Kernels& kernels, const Problem& problem, std::int64_t t,
            std::span<const std::uint64_t> candidates, const Heads& heads, Selector& selector,
            ScoreScratch& scratch) {
  const QueryRows rows = rows_for_keys(heads);
  std::uint32_t positions[2][kPageSize];  // of the current tile and the next one
  alignas(64) float scores[kPageSize];
  const auto tile_positions = [&](std::size_t first, std::uint32_t* out) {
    const std::size_t count =
        std::min<std::size_t>(kPageSize, candidates.size() - std::min(first, candidates.size()));
    for (std::size_t i = 0; i < count; ++i) {
      out[i] = pair_position(candidates[first + i]);
    }
    return std::span<const std::uint32_t>(out, count);
  };
  std::span<const std::uint32_t> current = tile_positions(0, positions[0]);
  for (std::size_t first = 0; !current.empty(); first += kPageSize) {
    const auto next = tile_positions(first + kPageSize, positions[first / kPageSize % 2 ^ 1]);
    prefetch_tile(problem, t, next);
    load_tile(kernels, problem, t, current, heads.operand, scratch.pack, scratch.tile);
    const int count = static_cast<int>(current.size());
    kernels.score(heads.operand, rows, scratch.tile, count, scores);
    kernels.offer(scores, scratch.tile.position, count, selector, scratch.entries);
    current = next;
  }
}

}  // namespace misa::cpu
