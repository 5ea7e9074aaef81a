// SPDX-License-Identifier: Apache-2.0
// Selection for the CPU backend, from the selectors to which all scores have been offered. A
// selection is a list of (position, score bits) pairs, ascending by position.
#pragma once

#include <cstdint>
#include <span>

#include "cpu/kernels.hpp"
#include "misa/indexer.hpp"

namespace misa::cpu {

// The best entries that were offered to any selector of a query that sees n keys, in the memory of
// the first selector. `scratch` holds as many entries as a selector.
std::span<const std::uint64_t> merge(const Kernels& kernels, std::span<Selector> selectors,
                                     std::int64_t n, std::uint64_t* scratch);

// All n keys, without their scores, in the memory of a selector.
std::span<const std::uint64_t> select_all(const Selector& selector, std::int64_t n);

// Writes row t of the outputs: the selection, then the padding.
void write_row(std::span<const std::uint64_t> selection, std::int64_t t, std::int64_t top_k,
               const Selection& out);

}  // namespace misa::cpu
