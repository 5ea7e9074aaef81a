// SPDX-License-Identifier: Apache-2.0
// Reading keys and query heads for the CPU backend.
#pragma once

#include <cstdint>
#include <span>

#include "core/problem.hpp"
#include "cpu/kernels.hpp"

namespace misa::cpu {

// Fills a tile with the keys of query t's sequence at up to 64 positions. `scratch` holds 64 rows
// of operands.
void load_tile(const Kernels& kernels, const Problem& problem, std::int64_t t,
               std::span<const std::uint32_t> positions, Operand operand, void* scratch,
               Tile& tile);

// The same for consecutive positions first … first + count - 1.
void load_page(const Kernels& kernels, const Problem& problem, std::int64_t t, std::int64_t first,
               int count, Operand operand, void* scratch, Tile& tile);

// Asks for the keys that a later load_tile will read. A tile's rows lie wherever the selection or
// the page order put them, which the hardware does not foresee.
void prefetch_tile(const Problem& problem, std::int64_t t,
                   std::span<const std::uint32_t> positions);
void prefetch_page(const Problem& problem, std::int64_t t, std::int64_t first, int count);

// All heads of query t as operands, [H][D].
void load_heads(const Kernels& kernels, const Problem& problem, std::int64_t t, Operand operand,
                void* out);

}  // namespace misa::cpu
