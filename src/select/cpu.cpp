// SPDX-License-Identifier: Apache-2.0
#include "select/cpu.hpp"

#include <algorithm>
#include <array>
#include <limits>
#include <utility>

#include "core/entry.hpp"

namespace misa::cpu {

void merge(const Kernels& kernels, const Selector& from, Selector& into, std::uint64_t* scratch) {
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

void sort_by_position(std::uint64_t* entries, std::int64_t count, std::int64_t n,
                      std::uint64_t* scratch) {
  for (std::int64_t i = 0; i < count; ++i) {
    entries[i] = (std::uint64_t{entry_position(entries[i])} << 32) | (entries[i] >> 32);
  }
  // Radix sort, least significant digit first; 11 bits a digit cover 4M positions in two passes
  // and their counters stay in the first-level cache.
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
    for (std::int32_t& place : start) {
      total += std::exchange(place, total);
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

void write_row(std::span<const std::uint64_t> pairs, std::int64_t t, std::int64_t top_k,
               const Selection& out) {
  const auto count = static_cast<std::int64_t>(pairs.size());
  if (!out.indices.empty()) {
    for (std::int64_t i = 0; i < top_k; ++i) {
      out.indices[t * top_k + i] =
          i < count ? static_cast<std::int32_t>(pair_position(pairs[i])) : -1;
    }
  }
  if (!out.scores.empty()) {
    for (std::int64_t i = 0; i < top_k; ++i) {
      out.scores[t * top_k + i] = i < count ? score_of_bits(static_cast<std::uint32_t>(pairs[i]))
                                            : -std::numeric_limits<float>::infinity();
    }
  }
}

}  // namespace misa::cpu
