// Heads of a query: as operands of the matrix product, and the choice of the best.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cuda/problem.hpp"
#include "device/elements.cuh"
#include "device/mma.cuh"
#include "device/shared.cuh"
#include "route/generic_config.cuh"
#include "select/entry.hpp"

namespace misa::cuda::route {

inline constexpr unsigned kWarp = 0xFFFFFFFFU;

__device__ inline const std::byte* head_row(const Queries& q, std::int64_t t, int head) {
  return static_cast<const std::byte*>(q.data) +
         (t * q.token_stride + head * q.head_stride) * static_cast<std::int64_t>(size_of(q.dtype));
}

// 16 * tiles heads of a query. Of each tile a lane holds heads g and g + 8 (g = lane / 4), and of
// those the elements that operand order gives to its place c among the four lanes of a head.
template <DType type, int dim, int tiles>
struct HeadRows {
  static constexpr int kSteps = dim / kStep;
  std::uint32_t a[kParts<type>][tiles][kSteps][4];

  // Heads `first` … of query t; those beyond H are zero.
  __device__ void load(const Queries& q, bool aligned, std::int64_t t, int first) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
    for (int m = 0; m < tiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int head = first + m * kTileHeads + half * 8 + lane / 4;
        Elements<type, dim / 4> elements;
        elements.clear();
        if (head < q.heads) {
          elements.load(head_row(q, t, head), lane % 4 * (dim / 4), aligned);
        }
#pragma unroll
        for (int s = 0; s < kSteps; ++s) {
#pragma unroll
          for (int part = 0; part < kParts<type>; ++part) {
            std::uint32_t pairs[2];
            elements.parts(s, part, pairs);
            a[part][m][s][half] = pairs[0];
            a[part][m][s][2 + half] = pairs[1];
          }
        }
      }
    }
  }

  // This lane's four elements of step s of head `half` of tile m, as fp32.
  __device__ void floats(int m, int half, int s, float (&out)[4]) const {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      out[e] = 0;
#pragma unroll
      for (int part = 0; part < kParts<type>; ++part) {
        const std::uint32_t pair = a[part][m][s][half + e / 2 * 2];
        out[e] += __uint_as_float(e % 2 == 0 ? pair << 16 : pair & 0xFFFF0000U);
      }
    }
  }
};

// x[m] += the products of the heads with 8 operand rows: head g and columns 2c, 2c + 1, then head
// g + 8. `rows` is the first of them, parts lie `part_stride` elements apart. The smallest parts
// come first, so that sums round as if there were no others.
template <DType type, int dim, int tiles>
__device__ void add_products(const HeadRows<type, dim, tiles>& heads, const std::uint16_t* rows,
                             int key_parts, int part_stride, float (&x)[tiles][4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::uint16_t* row = rows + lane % 8 * operand_pitch(dim) + lane / 8 * 8;
#pragma unroll
  for (int part = kParts<type> - 1; part >= 0; --part) {
    for (int key_part = key_parts - 1; key_part >= 0; --key_part) {
#pragma unroll
      for (int s = 0; s < dim / kStep; s += kStepsPerLoad) {
        std::uint32_t b[kStepsPerLoad][2];
        load_matrices(b, row + key_part * part_stride + s * kStep);
#pragma unroll
        for (int i = 0; i < kStepsPerLoad; ++i) {
#pragma unroll
          for (int m = 0; m < tiles; ++m) {
            mma_bf16(x[m], heads.a[part][m][s + i], b[i]);
          }
        }
      }
    }
  }
}

// Adds up what the four lanes of a head hold.
__device__ inline float sum_of_four(float value) {
  value += __shfl_xor_sync(kWarp, value, 1);
  return value + __shfl_xor_sync(kWarp, value, 2);
}

__device__ inline float sum_of_warp(float value) {
#pragma unroll
  for (int step = 1; step < 32; step *= 2) {
    value += __shfl_xor_sync(kWarp, value, step);
  }
  return value;
}

// Writes the `count` heads of largest value, ascending, and marks them in `active` if there is one;
// ties to the lower head, NaN last. A warp works; value(j) is asked once a head.
//  1. Lane l ranks heads l, l + 32, …: ordered bits, one more so that 0 is "no head".
//  2. The largest of all is taken and struck out, `count` times.
//  3. The taken heads' ranks among themselves are their places.
template <class Value>
__device__ void choose_heads(int heads, int count, const Value& value, std::int32_t* out,
                             std::uint32_t* active) {
  constexpr int kGroups = kMaxHeads / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  std::uint32_t key[kGroups];
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const int head = 32 * i + lane;
    key[i] = head < heads ? ordered_bits(value(head)) + 1 : 0;
  }
  std::uint32_t taken = 0;  // bit i: head 32 i + lane
  for (int n = 0; n < count; ++n) {
    std::uint32_t best = 0;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      best = max(best, key[i]);
    }
    best = __reduce_max_sync(kWarp, best);
    bool found = false;
#pragma unroll
    for (int i = 0; i < kGroups; ++i) {
      const std::uint32_t equal = __ballot_sync(kWarp, key[i] == best);
      if (!found && equal != 0) {
        found = true;
        if (lane == __ffs(static_cast<int>(equal)) - 1) {
          key[i] = 0;
          taken |= 1U << i;
        }
      }
    }
  }
  int place = 0;
#pragma unroll
  for (int i = 0; i < kGroups; ++i) {
    const bool mine = (taken >> i & 1) != 0;
    const std::uint32_t group = __ballot_sync(kWarp, mine);
    if (mine) {
      out[place + __popc(group & ((1U << lane) - 1))] = 32 * i + lane;
    }
    place += __popc(group);
    if (active != nullptr && lane == 0) {
      active[i] = group;
    }
  }
}

}  // namespace misa::cuda::route
