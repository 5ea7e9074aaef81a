// SPDX-License-Identifier: Apache-2.0
#include "filter/cpu.hpp"

#include <algorithm>

namespace misa::cpu {
namespace {

// The score over all heads of each block mean, in `scores`.
std::span<const float> block_scores(const Kernels& kernels, const Heads& heads,
                                    const BlockMeans& means, float* scores) {
  const QueryRows rows = rows_for_means(heads);
  alignas(64) float tile_scores[kPageSize];
  std::int64_t written = 0;
  const auto append = [&](const Tile& tile, int valid) {
    kernels.score(Operand::f32, rows, tile, valid, tile_scores);
    std::copy_n(tile_scores, valid, scores + written);
    written += valid;
  };
  for (std::size_t i = 0; i < means.whole.size(); ++i) {
    append(means.whole[i], valid_in_tile(i, means.whole_count));
  }
  if (means.partial != nullptr) {
    append(*means.partial, 1);
  }
  return {scores, static_cast<std::size_t>(written)};
}

}  // namespace

FilterScratch take_filter_scratch(Arena& arena, std::int64_t blocks) {
  return {arena.take<float>(blocks), take_ranking_scratch(arena, blocks)};
}

void keep_blocks(const Kernels& kernels, const Heads& heads, const BlockMeans& means,
                 std::int64_t count, const FilterScratch& scratch,
                 std::span<std::uint64_t> kept_blocks) {
  const std::span<const float> scores = block_scores(kernels, heads, means, scratch.scores);
  std::ranges::fill(kept_blocks, 0);
  const auto keep = [&](std::int64_t block) {
    kept_blocks[block / 64] |= std::uint64_t{1} << (block % 64);
  };
  keep(0);
  keep(std::ssize(scores) - 1);
  const std::span<const float> between = scores.subspan(1, scores.size() - 2);
  for (const std::int32_t i : top_indices(between, count - 2, scratch.ranking)) {
    keep(i + 1);
  }
}

}  // namespace misa::cpu
