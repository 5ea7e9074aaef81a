// SPDX-License-Identifier: Apache-2.0
#include "select/cpu.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "core/entry.hpp"
#include "cpu/ranking.hpp"

namespace misa::cpu {
namespace {

// Adds another selector's entries.
void merge_into(const Kernels& kernels, const Selector& from, Selector& into,
                std::uint64_t* scratch) {
  for (std::int64_t i = 0; i < from.count;) {
    const std::int64_t room = into.capacity - kSelectorSlack - into.count;
    const std::int64_t step = std::min(room, from.count - i);
    std::copy_n(from.entries + i, step, into.entries + into.count);
    into.count += step;
    i += step;
    if (i < from.count) {
      kernels.compact(into, scratch);
    }
  }
}

// Turns entries into pairs, ascending by position; every position is below n.
void sort_by_position(std::uint64_t* entries, std::int64_t count, std::int64_t n,
                      std::uint64_t* scratch) {
  for (std::int64_t i = 0; i < count; ++i) {
    entries[i] = (std::uint64_t{entry_position(entries[i])} << 32) | (entries[i] >> 32);
  }
  // A radix sort, least significant digit first. Digits of 11 bits cover 4M positions in two
  // passes, and their counters stay in the first-level cache.
  constexpr int kDigit = 11;
  std::array<std::int32_t, 1 << kDigit> start;
  std::uint64_t* from = entries;
  std::uint64_t* to = scratch;
  for (int shift = 32; (n - 1) >> (shift - 32) > 0; shift += kDigit) {
    const auto digit = [shift](std::uint64_t pair) {
      return (pair >> shift) & ((std::uint64_t{1} << kDigit) - 1);
    };
    start.fill(0);
    for (std::int64_t i = 0; i < count; ++i) {
      ++start[digit(from[i])];
    }
    std::int32_t total = 0;
    for (std::int32_t& first : start) {
      total += std::exchange(first, total);
    }
    for (std::int64_t i = 0; i < count; ++i) {
      to[start[digit(from[i])]++] = from[i];
    }
    std::swap(from, to);
  }
  if (from != entries) {
    std::copy_n(from, count, entries);
  }
}

}  // namespace

std::span<const std::uint64_t> merge(const Kernels& kernels, std::span<Selector> selectors,
                                     std::int64_t n, std::uint64_t* scratch) {
  Selector& merged = selectors.front();
  for (const Selector& selector : selectors.subspan(1)) {
    merge_into(kernels, selector, merged, scratch);
  }
  kernels.compact(merged, scratch);
  sort_by_position(merged.entries, merged.count, n, scratch);
  return {merged.entries, static_cast<std::size_t>(merged.count)};
}

std::span<const std::uint64_t> select_all(const Selector& selector, std::int64_t n) {
  for (std::int64_t i = 0; i < n; ++i) {
    selector.entries[i] = static_cast<std::uint64_t>(i) << 32;
  }
  return {selector.entries, static_cast<std::size_t>(n)};
}

void write_row(std::span<const std::uint64_t> selection, std::int64_t t, std::int64_t top_k,
               const Selection& out) {
  const std::int64_t count = std::ssize(selection);
  if (!out.indices.empty()) {
    for (std::int64_t i = 0; i < top_k; ++i) {
      out.indices[t * out.index_stride + i] =
          i < count ? static_cast<std::int32_t>(pair_position(selection[i])) : -1;
    }
  }
  if (!out.scores.empty()) {
    for (std::int64_t i = 0; i < top_k; ++i) {
      out.scores[t * out.score_stride + i] =
          i < count ? score_of_bits(static_cast<std::uint32_t>(selection[i]))
                    : -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace misa::cpu
