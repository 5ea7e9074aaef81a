// SPDX-License-Identifier: Apache-2.0
// An entry is a score and a position in one integer. Larger entries are selected first: those with
// larger scores and, among equal scores, those with lower positions. NaN comes last.
#pragma once

#include <bit>
#include <cstdint>
#include <limits>

namespace misa {

// Maps a score to an integer, in the order of the scores: NaN becomes 0, and -0 and +0 are equal.
constexpr std::uint32_t ordered_bits(float score) {
  if (score != score) {
    return 0;
  }
  const auto bits = std::bit_cast<std::uint32_t>(score + 0.0F);
  return (bits & 0x80000000U) != 0 ? ~bits : bits | 0x80000000U;
}

constexpr float score_of_bits(std::uint32_t ordered) {
  if (ordered == 0) {
    return std::numeric_limits<float>::quiet_NaN();
  }
  return std::bit_cast<float>((ordered & 0x80000000U) != 0 ? ordered ^ 0x80000000U : ~ordered);
}

constexpr std::uint64_t make_entry(float score, std::uint32_t position) {
  return (std::uint64_t{ordered_bits(score)} << 32) | static_cast<std::uint32_t>(~position);
}

constexpr std::uint32_t entry_position(std::uint64_t entry) {
  return ~static_cast<std::uint32_t>(entry);
}

constexpr float entry_score(std::uint64_t entry) {
  return score_of_bits(static_cast<std::uint32_t>(entry >> 32));
}

}  // namespace misa
