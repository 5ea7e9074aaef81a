// SPDX-License-Identifier: Apache-2.0
// The operand of query rows and the epilogue that the e4m3 scoring kernels share. The bits of a
// score depend only on the query's rows, their weights, the key and its scale: an element of a
// product does not depend on where its row and its key are in their tiles.
//
// The columns of a product are query rows, and a column's row can be chosen freely. A lane of a
// quad accumulates columns 8 j + 2 lane + e, its thread columns 2 j + e. These are the rows of one
// query after another, so that one thread has all rows of a query and sums them alone.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"
#include "cuda/ptx/mma.cuh"
#include "cuda/warp.cuh"
#include "score/sm90_fp8.hpp"
#include "score/sm90_fp8_config.cuh"

namespace misa::cuda::score {

// Loads query rows into the `columns` rows of a swizzled tile, in the order above, and their
// weights: zero where a query has fewer than `rows` rows, or where query_of(i), the i-th query of
// the tile, is -1. Called by threads 0 … threads - 1.
template <int rows, bool residual, int columns, class QueryOf>
__device__ void load_rows(const Problem& problem, const ActiveRows& active, int thread, int threads,
                          const QueryOf& query_of, std::uint8_t* tile,
                          float (*weights)[kProductWeights]) {
  const Queries& q = problem.q;
  for (int column = thread; column < columns; column += threads) {
    const int thread_column = column / 8 * 2 + column % 2;
    const int row = thread_column % rows;
    const std::int64_t t = query_of(4 * (thread_column / rows) + column % 8 / 2);
    const std::uint8_t* source = nullptr;
    float weight = 0;
    if (t >= 0 && row < active.head_count) {
      const std::int32_t head =
          active.heads == nullptr ? row : active.heads[t * active.head_count + row];
      if (is_head(q, head)) {
        source =
            static_cast<const std::uint8_t*>(q.data) + t * q.token_stride + head * q.head_stride;
        weight = __ldg(problem.w.data + t * problem.w.token_stride + head);
      }
    } else if (residual && t >= 0 && row == rows - 1) {
      source = active.residual + t * kDim;
      weight = __ldg(active.residual_scale + t);
    }
#pragma unroll
    for (int chunk = 0; chunk < kDim / 16; ++chunk) {
      const uint4 bytes = source == nullptr ? make_uint4(0, 0, 0, 0)
                                            : __ldg(reinterpret_cast<const uint4*>(source) + chunk);
      *reinterpret_cast<uint4*>(tile + column * kDim + (chunk ^ column % 8) * 16) = bytes;
    }
    weights[thread_column / kThreadColumns]
           [column % 8 / 2 * kLaneWeights + thread_column % kThreadColumns] = weight;
  }
}

// The weights of a thread's columns of a product, read from shared memory (`weights_of` of
// weighted_relu_sum).
struct SharedWeights {
  const float* lane_weights;

  __device__ SharedWeights(const float (&product)[kProductWeights], int lane)
      : lane_weights(product + lane % 4 * kLaneWeights) {}
  __device__ float4 operator()(int thread_column) const {
    return *reinterpret_cast<const float4*>(lane_weights + thread_column);
  }
};

// Heads in a group: the weighted products of a group are one chain of multiply-adds, the sums of
// the groups are added in order, and the residual row comes last. So the bits are the same whether
// one thread has all rows of a query or each lane of a quad a group (score/sm90_fp8_gathered.cu).
inline constexpr int kHeadGroup = 16;

// The epilogue of a product: calls write(g, r, score) for each of the thread's queries g and its
// two keys r. `sums` are the accumulators of `columns` thread columns from first_column on;
// weights_of(i) gives the weights of the four from first_column + i on. If `nonnegative_scales`, no
// scale is negative; otherwise the sign of a scale is moved to the sums, which is exact. Where a
// product has only some of a query's rows, `partial` carries the sum of the groups in earlier
// products.
template <int rows, bool residual, int first_column, bool nonnegative_scales, int columns,
          class WeightsOf, class Write>
__device__ void weighted_relu_sum(const float (&sums)[2 * columns], const WeightsOf& weights_of,
                                  const float* scales, float (&partial)[2], const Write& write) {
  constexpr int kQueryColumns = rows < columns ? rows : columns;        // of one query
  constexpr int kGroupColumns = rows < kHeadGroup ? rows : kHeadGroup;  // of one group of heads
#pragma unroll
  for (int i = 0; i < columns; i += kQueryColumns) {
    const int column = first_column + i;
    float score[2];
#pragma unroll
    for (int offset = 0; offset < kQueryColumns; offset += kGroupColumns) {
      const bool first = (column + offset) % rows == 0;
      const bool last = (column + offset + kGroupColumns) % rows == 0;
      float group[2] = {0, 0};
      float linear[2];
      float linear_weight = 0;
#pragma unroll
      for (int s = 0; s < kGroupColumns; s += 4) {
        const float4 packed = weights_of(i + offset + s);
        const float weight[4] = {packed.x, packed.y, packed.z, packed.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float x = sums[(i + offset + s + j) / 2 * 4 + 2 * r + j % 2];
            if (!nonnegative_scales) {
              x = copysignf(1.0F, scales[r]) * x;
            }
            if (residual && last && s + j == kGroupColumns - 1) {
              linear[r] = x;
              linear_weight = weight[j];
            } else {
              group[r] = __fmaf_rn(weight[j], max_nan(x, 0), group[r]);
            }
          }
        }
      }
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const float before = i + offset == 0 ? partial[r] : score[r];
        score[r] = first ? group[r] : __fadd_rn(before, group[r]);
        if (residual && last) {
          score[r] = __fmaf_rn(linear_weight, linear[r], score[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if ((column + kQueryColumns) % rows == 0) {
        write(column / rows, r,
              __fmul_rn(score[r], nonnegative_scales ? scales[r] : fabsf(scales[r])));
      } else {
        partial[r] = score[r];
      }
    }
  }
}

// Calls body<padded, residual>(), where `padded` is the smallest number of rows that kernels are
// built for and that is at least `rows`.
template <bool residual, class Body>
void for_rows(int rows, const Body& body) {
  if (rows <= 4) {
    body.template operator()<4, residual>();
  } else if (rows <= 8) {
    body.template operator()<8, residual>();
  } else if (rows <= 16) {
    body.template operator()<16, residual>();
  } else if (rows <= 32) {
    body.template operator()<32, residual>();
  } else {
    body.template operator()<64, residual>();
  }
}

template <class Body>
void for_rows(const ActiveRows& rows, const Body& body) {
  if (rows.residual != nullptr) {
    for_rows<true>(rows.count(), body);
  } else {
    for_rows<false>(rows.count(), body);
  }
}

}  // namespace misa::cuda::score
