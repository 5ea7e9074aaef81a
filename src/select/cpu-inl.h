// SPDX-License-Identifier: Apache-2.0
// Selection fused with scoring, on the CPU: scores above a threshold are appended to a buffer,
// which is compacted when it is full.
//
// offer:
//  1. The scores become order-preserving integers; entries above the threshold are appended.
//  2. If the buffer could not hold another tile, compact.
// compact (exact, as entries are distinct):
//  1. Two pivots from a sample bracket the keep-th largest entry.
//  2. One pass counts the entries above the bracket and collects those inside it.
//  3. This repeats inside the bracket, or above or below it if the entry is not inside, until few
//     entries are left. Ranked directly, they give the keep-th largest entry, the new threshold.
//  4. One pass drops the entries below it.

#if defined(MISA_SELECT_CPU_INL_H_) == defined(HWY_TARGET_TOGGLE)
#ifdef MISA_SELECT_CPU_INL_H_
#undef MISA_SELECT_CPU_INL_H_
#else
#define MISA_SELECT_CPU_INL_H_
#endif

#include <cstring>

#include "cpu/kernels.hpp"
#include "hwy/highway.h"

HWY_BEFORE_NAMESPACE();
namespace misa::MISA_CPU_NAMESPACE {
namespace HWY_NAMESPACE {

namespace hn = hwy::HWY_NAMESPACE;

// At most this many entries are ranked directly, by comparing all pairs.
inline constexpr std::int64_t kMaxRanked = 64;

// The rank-th largest (from 1) of up to kMaxRanked distinct entries, padded with zeros to a whole
// vector: the one that rank - 1 others exceed. No branch depends on the values.
HWY_INLINE std::uint64_t KthByRanking(const std::uint64_t* entries, std::int64_t count,
                                      std::int64_t rank) {
  const hn::ScalableTag<std::uint64_t> d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  std::uint64_t kth = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    const auto entry = hn::Set(d, entries[i]);
    std::int64_t larger = 0;
    for (std::int64_t j = 0; j < count; j += lanes) {
      larger +=
          static_cast<std::int64_t>(hn::CountTrue(d, hn::Gt(hn::LoadU(d, entries + j), entry)));
    }
    kth = larger == rank - 1 ? entries[i] : kth;
  }
  return kth;
}

// Entries as two vectors of 32-bit halves: the ordered bits of the score, and the inverted
// position.
using DHalf = hn::ScalableTag<std::uint32_t>;
using VHalf = hn::Vec<DHalf>;
using MHalf = hn::Mask<DHalf>;

// One entry, broadcast to all lanes.
struct BroadcastEntry {
  explicit HWY_INLINE BroadcastEntry(std::uint64_t entry)
      : bits(hn::Set(DHalf(), static_cast<std::uint32_t>(entry >> 32))),
        inverted(hn::Set(DHalf(), static_cast<std::uint32_t>(entry))) {}

  // Lanes whose entry is larger than this one.
  HWY_INLINE MHalf ExceededBy(VHalf entry_bits, VHalf entry_inverted) const {
    return hn::Or(hn::Gt(entry_bits, bits),
                  hn::And(hn::Eq(entry_bits, bits), hn::Gt(entry_inverted, inverted)));
  }

  VHalf bits;
  VHalf inverted;
};

// Stores the masked entries and returns their number. Writes a whole vector of entries.
HWY_INLINE std::int64_t StoreMasked(VHalf bits, VHalf inverted, MHalf mask, std::uint64_t* out) {
  const DHalf d;
  // Little-endian: the inverted position is the lower half of an entry.
  hn::StoreInterleaved2(hn::Compress(inverted, mask), hn::Compress(bits, mask), d,
                        reinterpret_cast<std::uint32_t*>(out));
  return static_cast<std::int64_t>(hn::CountTrue(d, mask));
}

// Copies the entries with low < entry <= high to `out`, which may be `entries` itself, and returns
// their number; adds the number of entries above `high` to `above`. Reads up to a vector beyond
// `count` entries, and writes up to a vector beyond the copied ones. Entries are neither 0 nor ~0,
// so low = 0 and high = ~0 exclude none.
inline std::int64_t Collect(const std::uint64_t* entries, std::int64_t count, std::uint64_t low,
                            std::uint64_t high, std::uint64_t* out, std::int64_t& above) {
  const DHalf d;
  const auto lanes = static_cast<std::int64_t>(hn::Lanes(d));
  const BroadcastEntry low_entry(low);
  const BroadcastEntry high_entry(high);
  std::int64_t copied = 0;
  std::int64_t over = 0;
  for (std::int64_t i = 0; i < count; i += lanes) {
    VHalf inverted;
    VHalf bits;
    hn::LoadInterleaved2(d, reinterpret_cast<const std::uint32_t*>(entries + i), inverted, bits);
    const MHalf real = hn::FirstN(d, static_cast<size_t>(count - i));
    const MHalf larger = hn::And(real, high_entry.ExceededBy(bits, inverted));
    const MHalf inside = hn::AndNot(larger, hn::And(real, low_entry.ExceededBy(bits, inverted)));
    over += static_cast<std::int64_t>(hn::CountTrue(d, larger));
    copied += StoreMasked(bits, inverted, inside, out + copied);
  }
  above += over;
  return copied;
}

// The rank-th largest (from 1) of distinct entries; scratch holds count entries and a vector.
inline std::uint64_t KthLargest(const std::uint64_t* entries, std::int64_t count, std::int64_t rank,
                                std::uint64_t* scratch) {
  // The rank among 32 samples has a standard deviation of at most 2.8, so the bracket, a margin of
  // 6 to either side, rarely misses the entry; it holds about a third of the entries.
  constexpr std::int64_t kSamples = 32;
  constexpr std::int64_t kMargin = 6;
  const std::uint64_t* source = entries;  // all entries in (floor, ceiling], `remaining` of them
  std::int64_t remaining = count;
  std::uint64_t floor = 0;
  std::uint64_t ceiling = ~std::uint64_t{0};
  while (remaining > kMaxRanked) {
    std::uint64_t sample[kSamples];
    for (std::int64_t i = 0; i < kSamples; ++i) {
      sample[i] = source[(2 * i + 1) * remaining / (2 * kSamples)];
    }
    const std::int64_t middle = rank * kSamples / remaining;
    const std::uint64_t high =
        middle >= kMargin ? KthByRanking(sample, kSamples, middle - kMargin + 1) : ceiling;
    const std::uint64_t low =
        middle + kMargin < kSamples ? KthByRanking(sample, kSamples, middle + kMargin + 1) : floor;
    std::int64_t above = 0;
    const std::int64_t inside = Collect(source, remaining, low, high, scratch, above);
    if (rank > above && rank <= above + inside) {
      floor = low;
      ceiling = high;
      rank -= above;
      remaining = inside;
    } else {
      // The bracket does not hold the entry. `source` may have been overwritten, so the entries
      // above or below the bracket are collected from all entries.
      if (rank <= above) {
        floor = high;
      } else {
        ceiling = low;
        rank -= above + inside;
      }
      std::int64_t ignored = 0;
      remaining = Collect(entries, count, floor, ceiling, scratch, ignored);
    }
    source = scratch;
  }
  std::uint64_t ranked[kMaxRanked] = {};
  memcpy(ranked, source, static_cast<size_t>(remaining) * sizeof(std::uint64_t));
  return KthByRanking(ranked, remaining, rank);
}

inline void Compact(cpu::Selector& selector, std::uint64_t* scratch) {
  if (selector.count <= selector.keep) {
    return;
  }
  selector.threshold = KthLargest(selector.entries, selector.count, selector.keep, scratch);
  std::int64_t ignored = 0;
  selector.count = Collect(selector.entries, selector.count, selector.threshold - 1,
                           ~std::uint64_t{0}, selector.entries, ignored);
}

inline void Offer(const float* HWY_RESTRICT scores, const std::uint32_t* HWY_RESTRICT position,
                  int valid, cpu::Selector& selector, std::uint64_t* scratch) {
  const hn::ScalableTag<float> df;
  const DHalf d;
  const int lanes = static_cast<int>(hn::Lanes(d));
  const BroadcastEntry threshold(selector.threshold);
  const VHalf sign = hn::Set(d, 0x80000000U);
  for (int i = 0; i < valid; i += lanes) {
    // See ordered_bits in entry.hpp.
    const auto score = hn::Add(hn::LoadU(df, scores + i), hn::Zero(df));
    const VHalf raw = hn::BitCast(d, score);
    const MHalf negative = hn::Ne(hn::And(raw, sign), hn::Zero(d));
    VHalf bits = hn::IfThenElse(negative, hn::Not(raw), hn::Or(raw, sign));
    bits = hn::IfThenElse(hn::RebindMask(d, hn::Eq(score, score)), bits, hn::Zero(d));
    const VHalf inverted = hn::Not(hn::LoadU(d, position + i));
    const MHalf passes = hn::And(hn::FirstN(d, static_cast<size_t>(valid - i)),
                                 threshold.ExceededBy(bits, inverted));
    if (!hn::AllFalse(d, passes)) {
      selector.count += StoreMasked(bits, inverted, passes, selector.entries + selector.count);
    }
  }
  if (selector.count + cpu::kSelectorSlack > selector.capacity) {
    Compact(selector, scratch);
  }
}

}  // namespace HWY_NAMESPACE
}  // namespace misa::MISA_CPU_NAMESPACE
HWY_AFTER_NAMESPACE();

#endif
