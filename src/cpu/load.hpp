// SPDX-License-Identifier: Apache-2.0
// Reading keys and query heads for the CPU backend.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "core/arena.hpp"
#include "core/problem.hpp"
#include "cpu/heads.hpp"
#include "cpu/kernels.hpp"

namespace misa::cpu {

// Memory for a tile of D rows of 64 operands.
Tile take_tile(Arena& arena, Operand operand, std::int64_t dim);

// Fills a tile with the keys at up to 64 positions of query t's sequence. `scratch` holds 64 rows
// of operands.
void load_tile(const Kernels& kernels, const Problem& problem, std::int64_t t,
               std::span<const std::uint32_t> positions, Operand operand, void* scratch,
               Tile& tile);

// The same for consecutive positions first … first + count - 1.
void load_page(const Kernels& kernels, const Problem& problem, std::int64_t t, std::int64_t first,
               int count, Operand operand, void* scratch, Tile& tile);

// The same with the keys' sketches (problem.config.sketch) in place of the keys. `rows` holds 64
// rows of D elements.
void load_sketched_page(const Kernels& kernels, const Problem& problem, std::int64_t t,
                        std::int64_t first, int count, Operand operand, std::uint16_t* rows,
                        void* scratch, Tile& tile);

// Prefetches the keys of a later load_tile or load_page, whose order the hardware cannot foresee.
void prefetch_tile(const Problem& problem, std::int64_t t,
                   std::span<const std::uint32_t> positions);
void prefetch_page(const Problem& problem, std::int64_t t, std::int64_t first, int count);

// All heads of query t as operands, [H][D].
void load_heads(const Kernels& kernels, const Problem& problem, std::int64_t t, Operand operand,
                void* out);

// Memory for the heads of one query.
struct HeadBuffers {
  std::byte* rows;  // [H][D] operands
  float* rows_f32;  // [H][D], or null where no block means are scored
  float* weight;    // [H]
};

HeadBuffers take_head_buffers(Arena& arena, Operand operand, std::int64_t heads, std::int64_t dim,
                              bool scores_means);

// All heads of query t in these buffers.
Heads load_heads(const Kernels& kernels, const Problem& problem, std::int64_t t, Operand operand,
                 const HeadBuffers& buffers);

}  // namespace misa::cpu
