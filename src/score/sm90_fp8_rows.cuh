// SPDX-License-Identifier: Apache-2.0
// What the scoring kernels share: how rows of queries are laid out for a product, and how a product
// becomes scores. The bits of a score are a function of the query's rows, the weights, the key and
// its scale: an element of a product does not depend on its place in the tile.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"
#include "cuda/ptx/mma.cuh"
#include "cuda/warp.cuh"
#include "score/sm90_fp8.hpp"
#include "score/sm90_fp8_config.cuh"

namespace misa::cuda::score {

// Rows of queries as `columns` rows of a swizzled tile (ProductColumns), with their weights: zero
// where a query has fewer rows, or query_of says -1. Called by the `threads` threads that have
// numbers thread = 0, 1 ….
template <int rows, bool residual, int columns, class QueryOf>
__device__ void load_rows(const Problem& problem, const ActiveRows& scored, int thread, int threads,
                          const QueryOf& query_of, std::uint8_t* tile,
                          float (*weights)[kProductWeights]) {
  const Queries& q = problem.q;
  for (int column = thread; column < columns; column += threads) {
    const int local = column / 8 * 2 + column % 2;
    const int slot = local % rows;
    const std::int64_t t = query_of(4 * (local / rows) + column % 8 / 2);
    const std::uint8_t* source = nullptr;
    float weight = 0;
    if (t >= 0 && slot < scored.head_count) {
      const std::int32_t head =
          scored.heads == nullptr ? slot : scored.heads[t * scored.head_count + slot];
      if (head >= 0) {
        source =
            static_cast<const std::uint8_t*>(q.data) + t * q.token_stride + head * q.head_stride;
        weight = __ldg(problem.w.data + t * problem.w.token_stride + head);
      }
    } else if (residual && t >= 0 && slot == rows - 1) {
      source = scored.residual + t * kDim;
      weight = __ldg(scored.residual_scale + t);
    }
#pragma unroll
    for (int chunk = 0; chunk < kDim / 16; ++chunk) {
      const uint4 bytes = source == nullptr ? make_uint4(0, 0, 0, 0)
                                            : __ldg(reinterpret_cast<const uint4*>(source) + chunk);
      *reinterpret_cast<uint4*>(tile + column * kDim + (chunk ^ column % 8) * 16) = bytes;
    }
    weights[local / kProductLocals][column % 8 / 2 * kLaneWeights + local % kProductLocals] =
        weight;
  }
}

// A thread's weights of a product's columns, where they stand in shared memory (weighted_relu_sum's
// weights_from).
struct SharedWeights {
  const float* own;

  __device__ SharedWeights(const float (&product)[kProductWeights], int lane)
      : own(product + lane % 4 * kLaneWeights) {}
  __device__ float4 operator()(int local) const {
    return *reinterpret_cast<const float4*>(own + local);
  }
};

// Heads whose weighted products are one chain of multiply-adds; the sums of such groups are added
// in order, and the residual row at last. One thread may have all rows of a query, or each lane of
// a quad a group (score/sm90_fp8_gathered.cu): the bits are the same.
inline constexpr int kGroupRows = 16;

// Scores of a thread's two keys of a product, from the sums of its locals first_local … and their
// weights: weights_from(i) are those of locals first_local + i … + 3. `plain`: no scale is
// negative; else the sign of a scale, which is exact, goes to the sums. Where a product holds but a
// part of a query's rows, `partial` carries the sum of the groups before. emit(g, r, score): the
// thread's query g and its key r.
template <int rows, bool residual, int first_local, bool plain, int locals, class WeightsFrom,
          class Emit>
__device__ void weighted_relu_sum(const float (&sums)[2 * locals], const WeightsFrom& weights_from,
                                  const float* scales, float (&partial)[2], const Emit& emit) {
  constexpr int kSlots = rows < locals ? rows : locals;          // of a query, in this product
  constexpr int kChain = rows < kGroupRows ? rows : kGroupRows;  // of one group
#pragma unroll
  for (int i = 0; i < locals; i += kSlots) {
    const int local = first_local + i;
    float score[2];
#pragma unroll
    for (int slot = 0; slot < kSlots; slot += kChain) {
      const bool first = (local + slot) % rows == 0;
      const bool last = (local + slot + kChain) % rows == 0;
      float group[2] = {0, 0};
      float linear[2];
      float linear_weight = 0;
#pragma unroll
      for (int s = 0; s < kChain; s += 4) {
        const float4 four = weights_from(i + slot + s);
        const float weight[4] = {four.x, four.y, four.z, four.w};
#pragma unroll
        for (int j = 0; j < 4; ++j) {
#pragma unroll
          for (int r = 0; r < 2; ++r) {
            float x = sums[(i + slot + s + j) / 2 * 4 + 2 * r + j % 2];
            if (!plain) {
              x = copysignf(1.0F, scales[r]) * x;
            }
            if (residual && last && s + j == kChain - 1) {
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
        const float before = i + slot == 0 ? partial[r] : score[r];
        score[r] = first ? group[r] : __fadd_rn(before, group[r]);
        if (residual && last) {
          score[r] = __fmaf_rn(linear_weight, linear[r], score[r]);
        }
      }
    }
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      if ((local + kSlots) % rows == 0) {
        emit(local / rows, r, __fmul_rn(score[r], plain ? scales[r] : fabsf(scales[r])));
      } else {
        partial[r] = score[r];
      }
    }
  }
}

// Calls body<rows, residual>() for the number of rows that a kernel is built for.
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
