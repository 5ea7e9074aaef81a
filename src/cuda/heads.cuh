// SPDX-License-Identifier: Apache-2.0
// Heads of a query: as operands of the matrix product, and the choice of the best.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/entry.hpp"
#include "cuda/elements.cuh"
#include "cuda/problem.hpp"
#include "cuda/ptx/mma.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/range.cuh"
#include "cuda/warp.cuh"

namespace misa::cuda {

// Rows of a tile of the matrix product: heads. Columns: keys or block means.
inline constexpr int kTileHeads = 16;
inline constexpr int kTileKeys = 8;

// Steps of the matrix product along D, and how many one load from shared memory serves.
inline constexpr int kStep = 16;
inline constexpr int kStepsPerLoad = 2;

__device__ inline const std::byte* head_row(const Queries& q, std::int64_t t, int head) {
  return static_cast<const std::byte*>(q.data) +
         (t * q.token_stride + head * q.head_stride) * static_cast<std::int64_t>(size_of(q.dtype));
}

// 16 * tiles heads of a query. Of each tile a lane holds heads g and g + 8 (g = lane / 4), and of
// those the elements that operand order gives to its place c among the four lanes of a head. With
// `fp16` operands are in fp16, else in bf16.
template <DType type, bool fp16, int dim, int tiles>
struct HeadRows {
  static constexpr int kSteps = dim / kStep;
  std::uint32_t a[kParts<type>][tiles][kSteps][4];

  // Heads `first` … of query t; those beyond H are zero.
  __device__ void load(const Queries& q, std::int64_t t, int first) {
    Raw raw;
    fetch(q, t, first, raw);
    take(raw);
  }

  // The same in two steps: what a lane holds as it lies in memory, and its conversion.
  using Raw = Elements<type, dim / 4>[tiles][2];

  __device__ static void fetch(const Queries& q, std::int64_t t, int first, Raw& raw) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int i = 0; i < tiles * 2; ++i) {
      const int head = first + i * 8 + lane / 4;
      raw[i / 2][i % 2].clear();
      if (head < q.heads) {
        raw[i / 2][i % 2].load(head_row(q, t, head), lane % 4 * (dim / 4));
      }
    }
  }

  __device__ void take(const Raw& raw) {
#pragma unroll
    for (int i = 0; i < tiles * 2; ++i) {
#pragma unroll
      for (int s = 0; s < kSteps; ++s) {
#pragma unroll
        for (int part = 0; part < kParts<type>; ++part) {
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

  // This lane's four elements of step s of head `half` of tile m, as fp32.
  __device__ void floats(int m, int half, int s, float (&out)[4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      out[e] = 0;
    }
#pragma unroll
    for (int part = 0; part < kParts<type>; ++part) {
#pragma unroll
      for (int p = 0; p < 2; ++p) {
        const std::uint32_t pair = a[part][m][s][half + 2 * p];
        const float2 two =
            fp16 ? fp16x2_to_floats(pair)
                 : make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000U));
        out[2 * p] = part == 0 ? two.x : out[2 * p] + two.x;
        out[2 * p + 1] = part == 0 ? two.y : out[2 * p + 1] + two.y;
      }
    }
  }
};

// What query t0 + l sees, for lane l of every warp; for lanes without one of the `queries`, which
// are fewer than lanes, nothing, from where no query's keys start.
__device__ inline Range range_of_lane(const Keys& keys, std::int64_t t0, int queries) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  return lane < queries ? visible(keys, t0 + lane) : Range{-1, 0};
}

// Where the run of queries from `first` on ends: at the first lane behind it that is another's.
__device__ inline int end_of_run(int first, bool another) {
  const std::uint32_t others = __ballot_sync(kFullMask, another);
  return first + __ffs(static_cast<int>(others >> first)) - 1;
}

// Queries first … end - 1, whose keys start at the same one: they share means of whole blocks.
struct QueryRun {
  int end;
  std::int32_t start;
  std::int32_t own;    // whole blocks that the lane's query sees; 0 if it is none of them
  std::int32_t whole;  // that the longest of them sees

  // From what queries see, a lane each, in keys and in whole blocks.
  __device__ QueryRun(int first, const Range& range, std::int32_t blocks)
      : start(__shfl_sync(kFullMask, range.start, first)) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    end = end_of_run(first, range.start != start);
    own = first <= lane && lane < end ? blocks : 0;
    whole = __reduce_max_sync(kFullMask, own);
  }
};

// Tiles of columns multiplied at once: with two tiles of heads four independent sums.
inline constexpr int kPair = 2;

// x[i][m] += the products of the heads with 8 operand rows, for some tiles of such rows: head g and
// columns 2c, 2c + 1, then head g + 8. `rows` is the first row, the next is `pitch` elements on,
// parts lie `part_stride` apart. The smallest parts come first, so that sums round as if there were
// no others.
template <int row_parts, DType type, bool fp16, int dim, int tiles, int columns>
__device__ void add_products(const HeadRows<type, fp16, dim, tiles>& heads,
                             const std::uint16_t* rows, int pitch, int part_stride,
                             float (&x)[columns][tiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::uint16_t* row = rows + lane % 8 * pitch + lane / 8 * 8;
#pragma unroll
  for (int part = kParts<type> - 1; part >= 0; --part) {
#pragma unroll
    for (int row_part = row_parts - 1; row_part >= 0; --row_part) {
#pragma unroll
      for (int s = 0; s < dim / kStep; s += kStepsPerLoad) {
        std::uint32_t b[columns][kStepsPerLoad][2];
#pragma unroll
        for (int i = 0; i < columns; ++i) {
          load_matrices(b[i], row + row_part * part_stride + i * kTileKeys * pitch + s * kStep);
        }
#pragma unroll
        for (int k = 0; k < kStepsPerLoad; ++k) {
#pragma unroll
          for (int i = 0; i < columns; ++i) {
#pragma unroll
            for (int m = 0; m < tiles; ++m) {
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

// Adds up what so many neighbouring lanes hold; all of them get the sum. No loop, which the
// compiler would schedule otherwise.
template <int lanes>
__device__ inline float sum_of_lanes(float value) {
  if constexpr (lanes > 1) {
    value = sum_of_lanes<lanes / 2>(value);
    return value + __shfl_xor_sync(kFullMask, value, lanes / 2);
  }
  return value;
}

// Adds up what the four lanes of a head hold.
__device__ inline float sum_of_four(float value) { return sum_of_lanes<4>(value); }

// Writes the `count` heads of largest value, ascending, and marks them in `active` if there is one;
// ties to the lower head, NaN last. A warp works; value(j) is asked once a head. No query has more
// than `max_heads`: the code for 256 is ten times as long as that for 64, and a kernel this short
// waits for its instructions.
//  1. Lane l ranks heads l, l + 32, …: ordered bits, one more so that 0 is "no head".
//  2. The largest of all is taken and struck out, `count` times.
//  3. The taken heads' ranks among themselves are their places.
template <int max_heads, class Value>
__device__ void choose_heads(int heads, int count, const Value& value, std::int32_t* out,
                             std::uint32_t* active) {
  constexpr int kGroups = max_heads / 32;
  const int groups = (heads + 31) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::uint32_t key[kGroups] = {};
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    if (i >= groups) {
      break;
    }
    const int head = 32 * i + lane;
    key[i] = head < heads ? ordered_bits(value(head)) + 1 : 0;
  }
  std::uint32_t taken = 0;  // bit i: head 32 i + lane
  for (int n = 0; n < count; ++n) {
    std::uint32_t best = 0;
    int lowest = 0;  // this lane's group of it
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      if (i >= groups) {
        break;
      }
      lowest = key[i] > best ? i : lowest;
      best = max(best, key[i]);
    }
    const std::uint32_t most = __reduce_max_sync(kFullMask, best);
    const auto head = static_cast<std::uint32_t>(32 * lowest + lane);
    if (__reduce_min_sync(kFullMask, best == most ? head : ~0U) == head) {
      taken |= 1U << lowest;
#pragma unroll
      for (int i = 0; i < kGroups; ++i) {
        key[i] = i == lowest ? 0 : key[i];
      }
    }
  }
  int place = 0;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const bool mine = (taken >> i & 1) != 0;
    const std::uint32_t group = __ballot_sync(kFullMask, mine);
    if (mine) {
      out[place + __popc(group & ((1U << lane) - 1))] = 32 * i + lane;
    }
    place += __popc(group);
    if (active != nullptr && lane == 0) {
      active[i] = group;
    }
  }
}

}  // namespace misa::cuda
