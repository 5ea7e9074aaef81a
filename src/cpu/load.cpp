// SPDX-License-Identifier: Apache-2.0
#include "cpu/load.hpp"

#include <cmath>

#include "core/sketch.hpp"

namespace misa::cpu {
namespace {

void store_operand(Operand operand, void* tile, int d, int key, float value) {
  if (operand == Operand::f32) {
    static_cast<float*>(tile)[d * kPageSize + key] = value;
  } else {
    static_cast<std::uint16_t*>(tile)[((d / 2) * kPageSize + key) * 2 + d % 2] =
        float_to_bf16(value);
  }
}

// Multiplies into a key the part of its scale that cannot multiply the score instead: the sign of a
// finite negative scale, or the whole of a scale that is not finite. Both products are exact in
// either operand type.
void fold_scale(const void* row, Operand operand, int key, Tile& tile) {
  const float scale = tile.scale[key];
  const float factor = std::isfinite(scale) ? -1.0F : scale;
  for (int d = 0; d < tile.dim; ++d) {
    store_operand(operand, tile.data, d, key, factor * element(row, DType::e4m3, d));
  }
  tile.scale[key] = std::isfinite(scale) ? -scale : 1.0F;
}

void prefetch_key(const Problem& problem, std::int64_t t, std::int64_t position) {
  constexpr std::int64_t kLine = 64;
  constexpr int kToL2 = 2;
  const auto* row = static_cast<const std::byte*>(problem.key(t, position).data);
  const std::int64_t bytes = format_of(problem.k_dtype()).element_bytes(problem.q.dim);
  for (std::int64_t i = 0; i < bytes; i += kLine) {
    __builtin_prefetch(row + i, 0, kToL2);
  }
}

}  // namespace

Tile take_tile(Arena& arena, Operand operand, std::int64_t dim) {
  Tile tile{};
  tile.data = arena.take<std::byte>(static_cast<std::int64_t>(size_of(operand)) * kPageSize * dim);
  return tile;
}

void load_tile(const Kernels& kernels, const Problem& problem, std::int64_t t,
               std::span<const std::uint32_t> positions, Operand operand, void* scratch,
               Tile& tile) {
  const void* rows[kPageSize] = {};
  const int count = static_cast<int>(positions.size());
  for (int i = 0; i < count; ++i) {
    const Key key = problem.key(t, positions[i]);
    rows[i] = key.data;
    tile.scale[i] = key.scale;
    tile.position[i] = positions[i];
  }
  tile.dim = static_cast<int>(problem.q.dim);
  const DType dtype = problem.k_dtype();
  kernels.pack(rows, dtype, count, tile.dim, operand, scratch, tile.data);
  tile.scaled = dtype == DType::e4m3;
  for (int i = 0; tile.scaled && i < count; ++i) {
    if (!(tile.scale[i] >= 0) || std::isinf(tile.scale[i])) {
      fold_scale(rows[i], operand, i, tile);
    }
  }
}

void load_page(const Kernels& kernels, const Problem& problem, std::int64_t t, std::int64_t first,
               int count, Operand operand, void* scratch, Tile& tile) {
  std::uint32_t positions[kPageSize];
  for (int i = 0; i < count; ++i) {
    positions[i] = static_cast<std::uint32_t>(first + i);
  }
  load_tile(kernels, problem, t, {positions, static_cast<std::size_t>(count)}, operand, scratch,
            tile);
}

void load_sketched_page(const Kernels& kernels, const Problem& problem, std::int64_t t,
                        std::int64_t first, int count, Operand operand, std::uint16_t* rows,
                        void* scratch, Tile& tile) {
  const void* row_pointers[kPageSize] = {};
  for (int i = 0; i < count; ++i) {
    const Key key = problem.key(t, first + i);
    std::uint16_t* row = rows + i * problem.q.dim;
    row_pointers[i] = row;
    tile.scale[i] =
        sketched_key(problem.config.sketch, reinterpret_cast<const std::uint8_t*>(key.data),
                     key.scale, problem.q.dim, row);
    tile.position[i] = static_cast<std::uint32_t>(first + i);
  }
  tile.dim = static_cast<int>(problem.q.dim);
  tile.scaled = true;
  kernels.pack(row_pointers, DType::bf16, count, tile.dim, operand, scratch, tile.data);
}

void prefetch_tile(const Problem& problem, std::int64_t t,
                   std::span<const std::uint32_t> positions) {
  for (const std::uint32_t position : positions) {
    prefetch_key(problem, t, position);
  }
}

void prefetch_page(const Problem& problem, std::int64_t t, std::int64_t first, int count) {
  for (int i = 0; i < count; ++i) {
    prefetch_key(problem, t, first + i);
  }
}

void load_heads(const Kernels& kernels, const Problem& problem, std::int64_t t, Operand operand,
                void* out) {
  const auto stride = static_cast<std::int64_t>(size_of(operand)) * problem.q.dim;
  for (std::int64_t j = 0; j < problem.q.heads; ++j) {
    kernels.convert(problem.query(t, j), problem.q.dtype, static_cast<int>(problem.q.dim), operand,
                    static_cast<std::byte*>(out) + j * stride);
  }
}

HeadBuffers take_head_buffers(Arena& arena, Operand operand, std::int64_t heads, std::int64_t dim,
                              bool scores_means) {
  const auto element = static_cast<std::int64_t>(size_of(operand));
  return {arena.take<std::byte>(heads * dim * element),
          scores_means ? arena.take<float>(heads * dim) : nullptr, arena.take<float>(heads)};
}

Heads load_heads(const Kernels& kernels, const Problem& problem, std::int64_t t, Operand operand,
                 const HeadBuffers& buffers) {
  load_heads(kernels, problem, t, operand, buffers.rows);
  if (buffers.rows_f32 != nullptr) {
    load_heads(kernels, problem, t, Operand::f32, buffers.rows_f32);
  }
  for (std::int64_t j = 0; j < problem.q.heads; ++j) {
    buffers.weight[j] = problem.weight(t, j);
  }
  return {buffers.rows,
          buffers.rows_f32,
          buffers.weight,
          static_cast<int>(problem.q.heads),
          static_cast<int>(problem.q.dim),
          operand};
}

}  // namespace misa::cpu
