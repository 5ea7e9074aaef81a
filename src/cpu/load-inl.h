// SPDX-License-Identifier: Apache-2.0
// Reading keys on the CPU: converts elements to f32 or bf16, and packs 64 rows into a tile with one
// key per lane.

#if defined(MISA_CPU_LOAD_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MISA_CPU_LOAD_INL_H_
#undef MISA_CPU_LOAD_INL_H_
#else
#define MISA_CPU_LOAD_INL_H_
#endif

#include <cstring>

#include "cpu/kernels.hpp"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace misa::MISA_CPU_NAMESPACE {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// Converts e4m3 in the low byte of each 16-bit lane to bf16, exactly.
template <class D16, class V16 = hn::Vec<D16>>
HWY_INLINE V16 DecodeE4m3(D16 d, V16 v) {
  // The eight subnormals, m * 2^-9.
  alignas(16) static constexpr std::uint16_t kSubnormal[8] = {0x0000, 0x3b00, 0x3b80, 0x3bc0,
                                                              0x3c00, 0x3c20, 0x3c40, 0x3c60};
  const hn::Repartition<std::uint8_t, D16> d8;
  const V16 magnitude = hn::And(v, hn::Set(d, 0x7f));
  const V16 sign = hn::ShiftLeft<8>(hn::AndNot(hn::Set(d, 0x7f), v));
  // The exponent's bias grows from 7 to 127, the mantissa from 3 bits to 7.
  const V16 normal = hn::Add(hn::ShiftLeft<4>(magnitude), hn::Set(d, 120 << 7));
  // The table lookup takes bytes 2m and 2m + 1.
  const V16 index =
      hn::Add(hn::Or(hn::ShiftLeft<1>(magnitude), hn::ShiftLeft<9>(magnitude)), hn::Set(d, 0x0100));
  const V16 low = hn::And(index, hn::Set(d, 0x0f0f));
  // The table fills a 128-bit block even where the indices fill half of one.
  const hn::FixedTag<std::uint8_t, HWY_MAX(16, hn::MaxLanes(decltype(d8)()))> d_table;
  const auto table = hn::LoadDup128(d_table, reinterpret_cast<const std::uint8_t*>(kSubnormal));
  const V16 subnormal = hn::BitCast(d, hn::TableLookupBytes(table, hn::BitCast(d8, low)));
  V16 bits = hn::IfThenElse(hn::Lt(magnitude, hn::Set(d, 8)), subnormal, normal);
  bits = hn::IfThenElse(hn::Eq(magnitude, hn::Set(d, 0x7f)), hn::Set(d, 0x7fc0), bits);
  return hn::Or(bits, sign);
}

// A vector of f32: the elements of a row from i on.
template <DType kType, class DF = hn::ScalableTag<float>>
HWY_INLINE hn::Vec<DF> LoadF32(DF d, const void* row, int i) {
  const hn::RebindToUnsigned<DF> d32;
  const hn::Rebind<std::uint16_t, DF> d16;
  const hn::Rebind<std::uint8_t, DF> d8;
  if constexpr (kType == DType::f32) {
    return hn::LoadU(d, static_cast<const float*>(row) + i);
  } else if constexpr (kType == DType::bf16) {
    const auto bits = hn::LoadU(d16, static_cast<const std::uint16_t*>(row) + i);
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
  } else {
    const auto bytes = hn::LoadU(d8, static_cast<const std::uint8_t*>(row) + i);
    const auto bits = DecodeE4m3(d16, hn::PromoteTo(d16, bytes));
    return hn::BitCast(d, hn::ShiftLeft<16>(hn::PromoteTo(d32, bits)));
  }
}

// Calls body with a dtype as a compile-time constant.
template <class Body>
HWY_INLINE void ForDType(DType dtype, const Body& body) {
  switch (dtype) {
    case DType::f32: return body(std::integral_constant<DType, DType::f32>());
    case DType::bf16: return body(std::integral_constant<DType, DType::bf16>());
    case DType::e4m3: return body(std::integral_constant<DType, DType::e4m3>());
  }
}

inline void Convert(const void* row, DType dtype, int dim, cpu::Operand operand, void* out) {
  if (operand == cpu::Operand::f32) {
    const hn::ScalableTag<float> d;
    const int lanes = static_cast<int>(hn::Lanes(d));
    ForDType(dtype, [&](auto type) HWY_ATTR {
      for (int i = 0; i < dim; i += lanes) {
        hn::StoreU(LoadF32<decltype(type)::value>(d, row, i), d, static_cast<float*>(out) + i);
      }
    });
  } else if (dtype == DType::bf16) {
    memcpy(out, row, static_cast<size_t>(dim) * sizeof(std::uint16_t));
  } else {
    const hn::ScalableTag<std::uint16_t> d;
    const hn::Rebind<std::uint8_t, decltype(d)> d8;
    const int lanes = static_cast<int>(hn::Lanes(d));
    for (int i = 0; i < dim; i += lanes) {
      const auto bytes = hn::LoadU(d8, static_cast<const std::uint8_t*>(row) + i);
      hn::StoreU(DecodeE4m3(d, hn::PromoteTo(d, bytes)), d, static_cast<std::uint16_t*>(out) + i);
    }
  }
}

// Transposes N rows of N words, N the lanes of a vector; the output's rows are 64 words apart.
//  1. Transpose 4 x 4 words in each group of four rows and each 128-bit block.
//  2. For each word, join the blocks of all groups.
HWY_INLINE void TransposeBlock(const std::uint32_t* const* HWY_RESTRICT rows, int word,
                               std::uint32_t* HWY_RESTRICT out) {
  const hn::ScalableTag<std::uint32_t> d;
  const hn::Repartition<std::uint64_t, decltype(d)> d64;
  constexpr int kLanes = static_cast<int>(hn::MaxLanes(decltype(d)()));
  constexpr int kGroups = kLanes / 4;
  hn::Vec<decltype(d)> group[kGroups][4];
#pragma GCC unroll 4
  for (int g = 0; g < kGroups; ++g) {
    const auto a = hn::LoadU(d, rows[4 * g] + word);
    const auto b = hn::LoadU(d, rows[4 * g + 1] + word);
    const auto c = hn::LoadU(d, rows[4 * g + 2] + word);
    const auto e = hn::LoadU(d, rows[4 * g + 3] + word);
    const auto ab_low = hn::BitCast(d64, hn::InterleaveLower(d, a, b));
    const auto ab_high = hn::BitCast(d64, hn::InterleaveUpper(d, a, b));
    const auto ce_low = hn::BitCast(d64, hn::InterleaveLower(d, c, e));
    const auto ce_high = hn::BitCast(d64, hn::InterleaveUpper(d, c, e));
    group[g][0] = hn::BitCast(d, hn::InterleaveLower(d64, ab_low, ce_low));
    group[g][1] = hn::BitCast(d, hn::InterleaveUpper(d64, ab_low, ce_low));
    group[g][2] = hn::BitCast(d, hn::InterleaveLower(d64, ab_high, ce_high));
    group[g][3] = hn::BitCast(d, hn::InterleaveUpper(d64, ab_high, ce_high));
  }
#pragma GCC unroll 4
  for (int j = 0; j < 4; ++j) {
    if constexpr (kGroups == 1) {
      hn::Store(group[0][j], d, out + j * kPageSize);
    } else if constexpr (kGroups == 2) {
      hn::Store(hn::ConcatLowerLower(d, group[1][j], group[0][j]), d, out + j * kPageSize);
      hn::Store(hn::ConcatUpperUpper(d, group[1][j], group[0][j]), d, out + (4 + j) * kPageSize);
    } else {
      const auto even01 = hn::OddEvenBlocks(hn::SwapAdjacentBlocks(group[1][j]), group[0][j]);
      const auto odd01 = hn::OddEvenBlocks(group[1][j], hn::SwapAdjacentBlocks(group[0][j]));
      const auto even23 = hn::OddEvenBlocks(hn::SwapAdjacentBlocks(group[3][j]), group[2][j]);
      const auto odd23 = hn::OddEvenBlocks(group[3][j], hn::SwapAdjacentBlocks(group[2][j]));
      hn::Store(hn::ConcatLowerLower(d, even23, even01), d, out + j * kPageSize);
      hn::Store(hn::ConcatLowerLower(d, odd23, odd01), d, out + (4 + j) * kPageSize);
      hn::Store(hn::ConcatUpperUpper(d, even23, even01), d, out + (8 + j) * kPageSize);
      hn::Store(hn::ConcatUpperUpper(d, odd23, odd01), d, out + (12 + j) * kPageSize);
    }
  }
}

// rows [count], scratch [64][D] operands. Lanes after `count`, up to a whole vector, repeat row 0.
inline void Pack(const void* const* rows, DType dtype, int count, int dim, cpu::Operand operand,
                 void* scratch, void* tile) {
  const int words = operand == cpu::Operand::f32 ? dim : dim / 2;
  const bool as_is = operand == cpu::Operand::f32 ? dtype == DType::f32 : dtype == DType::bf16;
  const std::uint32_t* word_rows[kPageSize];
  auto* converted = static_cast<std::uint32_t*>(scratch);
  for (int i = 0; i < kPageSize; ++i) {
    if (i >= count) {
      word_rows[i] = word_rows[0];
    } else if (as_is) {
      word_rows[i] = static_cast<const std::uint32_t*>(rows[i]);
    } else {
      word_rows[i] = converted + i * words;
      Convert(rows[i], dtype, dim, operand, converted + i * words);
    }
  }
  constexpr int kLanes = static_cast<int>(hn::MaxLanes(hn::ScalableTag<std::uint32_t>()));
  auto* out = static_cast<std::uint32_t*>(tile);
  for (int key = 0; key < count; key += kLanes) {
    for (int word = 0; word < words; word += kLanes) {
      TransposeBlock(word_rows + key, word, out + word * kPageSize + key);
    }
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace misa::MISA_CPU_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
