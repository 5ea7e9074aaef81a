// SPDX-License-Identifier: Apache-2.0
// Selection for the CPU backend: what follows the selectors.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/kernels.hpp"
#include "cpu/ranking.hpp"
#include "misa/indexer.hpp"

namespace misa::cpu {

// Adds another selector's entries.
void merge(const Kernels& kernels, const Selector& from, Selector& into, std::uint64_t* scratch);

// Turns entries into (position, score bits) pairs, ascending by position; every position < n.
void sort_by_position(std::uint64_t* entries, std::int64_t count, std::int64_t n,
                      std::uint64_t* scratch);

// Writes row t: pairs, then the padding.
void write_row(std::span<const std::uint64_t> pairs, std::int64_t t, std::int64_t top_k,
               const Selection& out);

}  // namespace misa::cpu
