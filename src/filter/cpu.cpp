// SPDX-License-Identifier: Apache-2.0
#include "filter/cpu.hpp"

#include <algorithm>

#include "cpu/ranking.hpp"

namespace misa::cpu {
namespace {

// The floor of every row: 0, that is max(0, x).
constexpr float kRelu[kMaxHeads] = {};

}  // namespace

void block_scores(const Kernels& kernels, const Heads& heads, const BlockMeans& means,
                  float* scores) {
  const QueryRows rows{heads.rows_f32, heads.weight, kRelu, heads.count};
  alignas(64) float tile_scores[kPageSize];
  const auto write = [&](const Tile& tile, int valid, std::int64_t first) {
    kernels.score(Operand::f32, rows, tile, valid, tile_scores);
    std::copy_n(tile_scores, valid, scores + first);
  };
  for (std::size_t i = 0; i < means.whole.size(); ++i) {
    write(means.whole[i], valid_in_tile(i, means.whole_count),
          static_cast<std::int64_t>(i) * kPageSize);
  }
  if (means.partial != nullptr) {
    write(*means.partial, 1, means.whole_count);
  }
}

void keep_blocks(std::span<const float> scores, std::int64_t count, std::uint64_t* ranking,
                 std::int32_t* indices, std::span<std::uint64_t> kept) {
  const std::int64_t between = count - 2;
  top_indices(scores.subspan(1, scores.size() - 2), between, ranking, indices);
  std::ranges::fill(kept, 0);
  const auto keep = [&](std::int64_t b) { kept[b / 64] |= std::uint64_t{1} << (b % 64); };
  keep(0);
  keep(std::ssize(scores) - 1);
  for (std::int64_t i = 0; i < between; ++i) {
    keep(indices[i] + 1);
  }
}

}  // namespace misa::cpu
