// SPDX-License-Identifier: Apache-2.0
// Scoring on the CPU. Each lane has a key of the tile, and the query's rows are broadcast. So each
// dot product is one chain of fused multiply-adds over d, and its bits do not depend on which other
// rows or keys are computed at the same time.
//
//  1. Take up to kRows rows and kVectors vectors of keys: kRows * kVectors accumulators.
//  2. For each d (or pair of d): load the keys, broadcast each row's element, accumulate.
//  3. Clip each accumulator at its row's floor, weight it and add it to the score, in order of the
//     rows.

#if defined(MISA_SCORE_CPU_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MISA_SCORE_CPU_INL_H_
#undef MISA_SCORE_CPU_INL_H_
#else
#define MISA_SCORE_CPU_INL_H_
#endif

#include <cstring>

#include "cpu/kernels.hpp"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace misa::MISA_CPU_NAMESPACE {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

using F32 = hn::ScalableTag<float>;
using VF = hn::Vec<F32>;

// A core that starts two multiply-adds per cycle, each with a latency of four to six cycles, needs
// 8 to 12 independent chains. Six rows by four vectors, the keys and a broadcast take 29 of 32
// registers; six by two take 15 of 16.
inline constexpr int kRows = 6;
inline constexpr int kVectors = HWY_TARGET == HWY_AVX2 || HWY_TARGET == HWY_SSE4 ? 2 : 4;

// f32 operands: one element per step.
struct F32Steps {
  using Element = float;
  static constexpr int kElements = 1;
  static HWY_INLINE VF Load(const float* keys) { return hn::Load(F32(), keys); }
  static HWY_INLINE VF Broadcast(const float* row) { return hn::Set(F32(), *row); }
  static HWY_INLINE VF MulAdd(VF row, VF keys, VF sum) { return hn::MulAdd(row, keys, sum); }
};

#if MISA_NATIVE_BF16
// bf16 operands: two elements per step, exact products, fp32 sums (VDPBF16PS).
struct Bf16Steps {
  using Element = std::uint16_t;
  static constexpr int kElements = 2;
  static HWY_INLINE VF Load(const std::uint16_t* keys) {
    return VF{_mm512_load_ps(reinterpret_cast<const float*>(keys))};
  }
  static HWY_INLINE VF Broadcast(const std::uint16_t* row) {
    float pair;
    memcpy(&pair, row, sizeof pair);
    return hn::Set(F32(), pair);
  }
  static HWY_INLINE VF MulAdd(VF row, VF keys, VF sum) {
    return VF{_mm512_dpbf16_ps(sum.raw, (__m512bh)row.raw, (__m512bh)keys.raw)};
  }
};
#endif

// Steps 1 and 2: acc[v * R + r] has the dot products of row r and the keys of vector v.
template <class Steps, int R, int V>
HWY_INLINE void Dot(const typename Steps::Element* HWY_RESTRICT rows,
                    const typename Steps::Element* HWY_RESTRICT keys, int dim, VF (&acc)[V * R]) {
  constexpr int kE = Steps::kElements;
  const int lanes = static_cast<int>(hn::Lanes(F32()));
  for (auto& sum : acc) {
    sum = hn::Zero(F32());
  }
  for (int d = 0; d < dim; d += kE) {
    VF key[V];
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) {
      key[v] = Steps::Load(keys + d * kPageSize + v * lanes * kE);
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const VF row = Steps::Broadcast(rows + r * dim + d);
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        acc[v * R + r] = Steps::MulAdd(row, key[v], acc[v * R + r]);
      }
    }
  }
}

// Calls body(std::integral_constant of `size`, first), for a size of at most R.
template <int R, class Body>
HWY_INLINE void CallForSize(int size, int first, const Body& body) {
  if constexpr (R > 0) {
    if (size == R) {
      body(std::integral_constant<int, R>(), first);
    } else {
      CallForSize<R - 1>(size, first, body);
    }
  }
}

// Calls body(size, first row) for all rows, in groups of nearly equal size: a short last group
// would have too few chains to hide the latency.
template <class Body>
HWY_INLINE void ForRowGroups(int count, const Body& body) {
  const int groups = (count + kRows - 1) / kRows;
  int first = 0;
  for (int g = 0; g < groups; ++g) {
    const int size = (count - first + groups - g - 1) / (groups - g);
    CallForSize<kRows>(size, first, body);
    first += size;
  }
}

template <class Steps>
void ScoreTile(const cpu::QueryRows& rows, const cpu::Tile& tile, int valid,
               float* HWY_RESTRICT out) {
  using Element = typename Steps::Element;
  const F32 d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const auto* row_data = static_cast<const Element*>(rows.data);
  const auto* keys = static_cast<const Element*>(tile.data);
  for (int key = 0; key < valid; key += kVectors * lanes) {
    VF score[kVectors];
    for (auto& sum : score) {
      sum = hn::Zero(d);
    }
    ForRowGroups(rows.count, [&](auto size, int first) HWY_ATTR {
      constexpr int R = decltype(size)::value;
      VF acc[kVectors * R];
      Dot<Steps, R, kVectors>(row_data + first * tile.dim, keys + key * Steps::kElements, tile.dim,
                              acc);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const VF floor = hn::Set(d, rows.floor[first + r]);
        const VF weight = hn::Set(d, rows.weight[first + r]);
#pragma GCC unroll 4
        for (int v = 0; v < kVectors; ++v) {
          // If either operand of Max is NaN, x86 returns the second one.
          score[v] = hn::MulAdd(weight, hn::Max(floor, acc[v * R + r]), score[v]);
        }
      }
    });
    for (int v = 0; v < kVectors; ++v) {
      if (tile.scaled) {
        score[v] = hn::Mul(score[v], hn::Load(d, tile.scale + key + v * lanes));
      }
      hn::Store(score[v], d, out + key + v * lanes);
    }
  }
}

// out[r * stride + i]: the dot product of row r and key i, times the key's scale. V vectors of keys
// at a time.
template <class Steps, int V>
void DotTile(const void* rows, int count, const cpu::Tile& tile, int valid, std::int64_t stride,
             float* HWY_RESTRICT out) {
  using Element = typename Steps::Element;
  const F32 d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const auto* row_data = static_cast<const Element*>(rows);
  const auto* keys = static_cast<const Element*>(tile.data);
  for (int key = 0; key < valid; key += V * lanes) {
    ForRowGroups(count, [&](auto size, int first) HWY_ATTR {
      constexpr int R = decltype(size)::value;
      VF acc[V * R];
      Dot<Steps, R, V>(row_data + first * tile.dim, keys + key * Steps::kElements, tile.dim, acc);
      for (int v = 0; v < V; ++v) {
        const int at = key + v * lanes;
        const VF scale = tile.scaled ? hn::Load(d, tile.scale + at) : hn::Set(d, 1.0F);
        for (int r = 0; r < R; ++r) {
          hn::Store(hn::Mul(acc[v * R + r], scale), d, out + (first + r) * stride + at);
        }
      }
    });
  }
}

// Uses a single vector where it holds all valid keys (a block's mean, a single key).
template <class Steps>
HWY_INLINE void DotTileOf(const void* rows, int count, const cpu::Tile& tile, int valid,
                          std::int64_t stride, float* out) {
  if (valid <= static_cast<int>(hn::Lanes(F32()))) {
    return DotTile<Steps, 1>(rows, count, tile, valid, stride, out);
  }
  DotTile<Steps, kVectors>(rows, count, tile, valid, stride, out);
}

inline void Score(cpu::Operand operand, const cpu::QueryRows& rows, const cpu::Tile& tile,
                  int valid, float* out) {
#if MISA_NATIVE_BF16
  if (operand == cpu::Operand::bf16) {
    return ScoreTile<Bf16Steps>(rows, tile, valid, out);
  }
#endif
  (void)operand;
  ScoreTile<F32Steps>(rows, tile, valid, out);
}

inline void Dots(cpu::Operand operand, const void* rows, int count, const cpu::Tile& tile,
                 int valid, std::int64_t stride, float* out) {
#if MISA_NATIVE_BF16
  if (operand == cpu::Operand::bf16) {
    return DotTileOf<Bf16Steps>(rows, count, tile, valid, stride, out);
  }
#endif
  (void)operand;
  DotTileOf<F32Steps>(rows, count, tile, valid, stride, out);
}

}  // namespace HWY_NAMESPACE
}  // namespace misa::MISA_CPU_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
