// SPDX-License-Identifier: Apache-2.0
// Selection for the CPU backend: rankings of few values, and what follows the selectors.
#pragma once

#include <cstdint>
#include <span>

#include "dispatch/cpu_kernels.hpp"
#include "misa/indexer.hpp"

namespace misa::cpu {

// The indices of the `keep` largest values, ascending: ties to the lower index, NaN below every
// number. `scratch` holds one entry a value.
void top_indices(std::span<const float> values, std::int64_t keep, std::uint64_t* scratch,
                 std::int32_t* out);

// Adds another selector's entries.
void merge(const Kernels& kernels, const Selector& from, Selector& into, std::uint64_t* scratch);

// Turns entries into (position, score bits) pairs, ascending by position; every position < n.
void sort_by_position(std::uint64_t* entries, std::int64_t count, std::int64_t n,
                      std::uint64_t* scratch);

// The parts of such a pair.
constexpr std::uint32_t pair_position(std::uint64_t pair) {
  return static_cast<std::uint32_t>(pair >> 32);
}

// Writes row t: pairs, then the padding.
void write_row(std::span<const std::uint64_t> pairs, std::int64_t t, std::int64_t top_k,
               const Selection& out);

}  // namespace misa::cpu
