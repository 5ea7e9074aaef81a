// SPDX-License-Identifier: Apache-2.0
// Heads of a query as operands of mma.sync, runs of queries that share keys, and the choice of the
// best heads.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "core/entry.hpp"
#include "cuda/elements.cuh"
#include "cuda/key_source.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/warp.cuh"

namespace misa::cuda {

// The shape of one MMA, m16n8k16: its rows are heads, its columns keys or block means, its depth
// elements of D.
inline constexpr int kMmaHeads = 16;
inline constexpr int kMmaColumns = 8;
inline constexpr int kMmaDepth = 16;

// MMAs, along the depth, whose column operand one ldmatrix loads.
inline constexpr int kDepthsPerLoad = 2;

__device__ inline const std::byte* head_row(const Queries& q, std::int64_t t, int head) {
  return static_cast<const std::byte*>(q.data) +
         (t * q.token_stride + head * q.head_stride) * static_cast<std::int64_t>(size_of(q.dtype));
}

// 16 * head_tiles heads of a query as the A operands of MMAs, in fp16 if `fp16`, else in bf16. From
// each tile a lane holds heads g and g + 8, where g = lane / 4, and from each head the quarter c =
// lane % 4 of the elements (elements.cuh, operand order).
template <DType type, bool fp16, int dim, int head_tiles>
struct HeadOperands {
  static constexpr int kSteps = dim / kMmaDepth;
  std::uint32_t a[kBf16Parts<type>][head_tiles][kSteps][4];

  // Loads heads first, first + 1, … of query t; heads beyond H are zero.
  __device__ void load(const Queries& q, std::int64_t t, int first) {
    Raw raw;
    fetch(q, t, first, raw);
    convert(raw);
  }

  // The same in two steps, so that loads can be in flight during other work: fetch loads the lane's
  // elements as they are in memory, convert makes operands of them.
  using Raw = Elements<type, dim / 4>[head_tiles][2];

  __device__ static void fetch(const Queries& q, std::int64_t t, int first, Raw& raw) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < head_tiles * 2; ++i) {
      const int head = first + i * 8 + lane / 4;
      raw[i / 2][i % 2].clear();
      if (head < q.heads) {
        raw[i / 2][i % 2].load(head_row(q, t, head), lane % 4 * (dim / 4));
      }
    }
  }

  __device__ void convert(const Raw& raw) {
#pragma unroll
    for (int i = 0; i < head_tiles * 2; ++i) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int part = 0; part < kBf16Parts<type>; ++part) {
          std::uint32_t pairs[2];
          if constexpr (fp16) {
            raw[i / 2][i % 2].fp16(s, pairs);
          } else {
            raw[i / 2][i % 2].parts(s, part, pairs);
          }
          a[part][i / 2][s][i % 2] = pairs[0];
          a[part][i / 2][s][2 + i % 2] = pairs[1];
        }
      }
    }
  }

  // The lane's four elements at depth s, as fp32, of head g (half 0) or g + 8 (half 1) of tile m.
  __device__ void floats(int m, int half, int s, float (&out)[4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      out[e] = 0;
    }
#pragma unroll
    for (int part = 0; part < kBf16Parts<type>; ++part) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const std::uint32_t pair = a[part][m][s][half + 2 * p];
        const float2 values =
            fp16 ? fp16x2_to_floats(pair)
                 : make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000U));
        out[2 * p] = part == 0 ? values.x : out[2 * p] + values.x;
        out[2 * p + 1] = part == 0 ? values.y : out[2 * p + 1] + values.y;
      }
    }
  }
};

// The keys that query t0 + l sees, for lane l of every warp. There are fewer than 32 `queries`;
// lanes without a query get no keys, and a start that no query has.
template <class Source>
__device__ inline Range range_of_lane(const Source& keys, std::int64_t t0, int queries) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return lane < queries ? visible(keys, t0 + lane) : Range{-1, 0};
}

// End of the run of queries that begins with query `first`: the next lane whose query is of another
// run.
__device__ inline int end_of_run(int first, bool other_run) {
  const std::uint32_t others = __ballot_sync(kFullMask, other_run);
  return first + __ffs(static_cast<int>(others >> first)) - 1;
}

// Consecutive queries first … end - 1 of a thread block whose keys start at the same key, so that
// they share the means of whole blocks.
struct QueryRun {
  int end;
  std::int32_t sequence_start;
  std::int32_t lane_blocks;  // whole blocks that the lane's query sees; 0 if it is not of the run
  std::int32_t max_blocks;   // the largest lane_blocks

  // `range` and `blocks`: the keys and the whole blocks that the lane's query sees.
  __device__ QueryRun(int first, const Range& range, std::int32_t blocks)
      : sequence_start(__shfl_sync(kFullMask, range.start, first)) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    end = end_of_run(first, range.start != sequence_start);
    lane_blocks = first <= lane && lane < end ? blocks : 0;
    max_blocks = __reduce_max_sync(kFullMask, lane_blocks);
  }
};

// The blocks that a thread block gets of `blocks` if those of its column of the grid divide the
// tiles among them.
struct TileShare {
  std::int32_t first;
  std::int32_t end;

  __device__ TileShare(std::int32_t blocks, std::int32_t tile) {
    const std::int32_t tiles = (blocks + tile - 1) / tile;
    const auto shares = static_cast<std::int32_t>(gridDim.y);
    const std::int32_t each = (tiles + shares - 1) / shares * tile;
    first = min(static_cast<std::int32_t>(blockIdx.y) * each, blocks);
    end = min(first + each, blocks);
  }
};

// The grid of `columns` thread blocks or, if more run at a time, several times as many, at most one
// for each tile of up to `blocks` blocks.
inline dim3 shared_tiles_grid(std::int64_t columns, std::int64_t blocks, std::int64_t tile,
                              std::int64_t at_a_time) {
  const std::int64_t tiles = std::max<std::int64_t>((blocks + tile - 1) / tile, 1);
  return dim3(static_cast<unsigned>(columns),
              static_cast<unsigned>(std::clamp<std::int64_t>(at_a_time / columns, 1, tiles)));
}

// Tiles of columns per call of add_products: with two tiles of heads, four independent
// accumulators.
inline constexpr int kColumnTiles = 2;

// x[i][m] += products of head tile m with column tile i, which is 8 operand rows in shared memory.
// A lane gets head g with columns 2c and 2c + 1, then head g + 8 with the same. `rows` is the first
// operand row; rows are `pitch` elements apart, parts `part_stride`. The smallest parts are added
// first, so that sums round as if operands were not split.
template <int row_parts, DType type, bool fp16, int dim, int head_tiles, int column_tiles>
__device__ void add_products(const HeadOperands<type, fp16, dim, head_tiles>& heads,
                             const std::uint16_t* rows, int pitch, int part_stride,
                             float (&x)[column_tiles][head_tiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::uint16_t* row = rows + lane % 8 * pitch + lane / 8 * 8;
#pragma unroll
  for (int part = kBf16Parts<type> - 1; part >= 0; --part) {
#pragma unroll
    for (int row_part = row_parts - 1; row_part >= 0; --row_part) {
#pragma unroll
      for (int s = 0; s < dim / kMmaDepth; s += kDepthsPerLoad) {
        std::uint32_t b[column_tiles][kDepthsPerLoad][2];
#pragma unroll
        for (int i = 0; i < column_tiles; ++i) {
          load_matrices(b[i],
                        row + row_part * part_stride + i * kMmaColumns * pitch + s * kMmaDepth);
        }
#pragma unroll
        for (int k = 0; k < kDepthsPerLoad; ++k) {
#pragma unroll
          for (int i = 0; i < column_tiles; ++i) {
#pragma unroll
            for (int m = 0; m < head_tiles; ++m) {
              if constexpr (fp16) {
                mma_fp16(x[i][m], heads.a[part][m][s + k], b[i][k]);
              } else {
                mma_bf16(x[i][m], heads.a[part][m][s + k], b[i][k]);
              }
            }
          }
        }
      }
    }
  }
}

// Returns, in every lane, the sum of `value` over the lane's group of `lanes` neighbouring lanes.
// Recursive because the compiler schedules a loop differently.
template <int lanes>
__device__ inline float lane_sum(float value) {
  if constexpr (lanes > 1) {
    value = lane_sum<lanes / 2>(value);
    return value + __shfl_xor_sync(kFullMask, value, lanes / 2);
  }
  return value;
}

// The sum over a quad: the four lanes that hold parts of the same head.
__device__ inline float quad_sum(float value) { return lane_sum<4>(value); }

// Writes the `count` heads of largest value in ascending order and, unless `active` is null, sets
// their bits there. Ties go to the lower head; NaN ranks last. All lanes of a warp call; value(j)
// is called once per head. No query has more than `max_heads` heads: code for 256 is ten times as
// long as code for 64, and fetching instructions takes a large part of a kernel this short.
//  1. Lane l holds a sort key for each of heads l, l + 32, …: ordered bits plus one, 0 where there
//     is no head.
//  2. `count` times, the head of the largest key is chosen and its key cleared.
//  3. Chosen heads are written in order, at indices counted with ballots.
template <int max_heads, class Value>
__device__ void choose_heads(int heads, int count, const Value& value, std::int32_t* out,
                             std::uint32_t* active) {
  constexpr int kLaneHeads = max_heads / 32;
  const int lane_heads = (heads + 31) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::uint32_t key[kLaneHeads] = {};
#pragma unroll
  for (int i = 0; i < kLaneHeads; ++i) {
    if (i >= lane_heads) {
      break;
    }
    const int head = 32 * i + lane;
    key[i] = head < heads ? ordered_bits(value(head)) + 1 : 0;
  }
  std::uint32_t chosen = 0;  // bit i: head 32 i + lane
  for (int n = 0; n < count; ++n) {
    std::uint32_t lane_best = 0;
    int best_index = 0;  // among the lane's heads
#pragma unroll
    for (int i = 0; i < kLaneHeads; ++i) {
      if (i >= lane_heads) {
        break;
      }
      best_index = key[i] > lane_best ? i : best_index;
      lane_best = max(lane_best, key[i]);
    }
    const std::uint32_t best = __reduce_max_sync(kFullMask, lane_best);
    const auto head = static_cast<std::uint32_t>(32 * best_index + lane);
    if (__reduce_min_sync(kFullMask, lane_best == best ? head : ~0U) == head) {
      chosen |= 1U << best_index;
#pragma unroll
      for (int i = 0; i < kLaneHeads; ++i) {
        key[i] = i == best_index ? 0 : key[i];
      }
    }
  }
  int written = 0;
#pragma unroll
  for (int i = 0; i < kLaneHeads; ++i) {
    const bool write = (chosen >> i & 1) != 0;
    const std::uint32_t chosen_lanes = __ballot_sync(kFullMask, write);
    if (write) {
      out[written + __popc(chosen_lanes & ((1U << lane) - 1))] = 32 * i + lane;
    }
    written += __popc(chosen_lanes);
    if (active != nullptr && lane == 0) {
      active[i] = chosen_lanes;
    }
  }
}

}  // namespace misa::cuda
