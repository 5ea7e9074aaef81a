// SPDX-License-Identifier: Apache-2.0
// The CPU backend's inner loops: one table of functions per instruction set. All other code is
// compiled once and calls them through a table. The loops of a stage are in its folder's cpu-inl.h.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "misa/types.hpp"

namespace misa::cpu {

// The elements of a tile and of the query rows that score it. bf16, which holds bf16 and e4m3
// values exactly, is used where the instruction set multiplies it; otherwise f32.
enum class Operand : std::uint8_t { f32, bf16 };

constexpr std::size_t size_of(Operand operand) { return operand == Operand::f32 ? 4 : 2; }

// 64 keys, one per lane: f32 [D][64], or bf16 [D/2][64][2]. A key's dot product is then summed over
// d in one fixed order, whichever keys share its tile.
struct alignas(64) Tile {
  float scale[kPageSize];             // per key, multiplies its score
  std::uint32_t position[kPageSize];  // per key, relative to the query's sequence
  void* data;
  int dim;
  bool scaled;  // false: every scale is 1
};

// The rows that score keys for one query: heads ascending, then the rows of the residual.
struct QueryRows {
  const void* data;     // [count][D] operands
  const float* weight;  // [count]
  const float* floor;   // [count]: 0 for max(0, x); -inf for a linear row
  int count;
};

// Holds at least the `keep` best of the entries (core/entry.hpp) that it was offered.
struct Selector {
  std::uint64_t* entries;  // [capacity]
  std::int64_t count;
  std::int64_t capacity;  // at least keep + kSelectorSlack
  std::int64_t keep;
  std::uint64_t threshold;  // only larger entries can still be among the best
};

// Room for the entries of one tile, and for what a vector store writes after the last of them.
inline constexpr std::int64_t kSelectorSlack = 2 * kPageSize;

// For each head, the least-squares fit of max(0, x) by a line, where x are the head's dot products
// with the sampled keys.
struct HeadFit {
  float* slope;         // [H] of the line
  float* nonlinearity;  // [H] rms of the fit's error
  float* dispersion;    // [H] standard deviation of max(0, x)
};

struct Kernels {
  const char* name;  // the backend's name
  const char* isa;
  const char* requirement;
  int priority;
  bool native_bf16;
  bool (*available)();

  // load: converts a row of D elements to operands; packs `count` rows, up to 64, into a tile.
  void (*convert)(const void* row, DType dtype, int dim, Operand operand, void* out);
  void (*pack)(const void* const* rows, DType dtype, int count, int dim, Operand operand,
               void* scratch, void* tile);

  // pool: add_keys adds scale * row of each key to sum[D], in order; add adds one row.
  void (*add_keys)(const void* const* rows, const float* scale, DType dtype, int count, int dim,
                   float* sum);
  void (*add)(const float* addend, int dim, float* sum);

  // score: the scores of a tile's first `valid` keys, out[64]. Whole vectors are written.
  void (*score)(Operand operand, const QueryRows& rows, const Tile& tile, int valid, float* out);
  // The dot products of these keys with each row j, out[j * stride + key].
  void (*dots)(Operand operand, const void* rows, int count, const Tile& tile, int valid,
               std::int64_t stride, float* out);

  // route: adds |w * max(0, x)| of each dot product x to the energy of the head, in energy[H].
  void (*add_energy)(const float* dots, std::int64_t stride, int heads, int valid,
                     const float* weight, float* energy);
  void (*fit)(const float* dots, std::int64_t stride, int heads, int count, const HeadFit& out);
  // The sum of (scale * element)^2 over a row.
  float (*sum_squares)(const void* row, DType dtype, float scale, int dim);
  // Adds factor * row to sum[D].
  void (*add_scaled)(float factor, const void* row, DType dtype, int dim, float* sum);

  // select: offers a tile's first `valid` scores. The scratch holds selector.capacity entries.
  void (*offer)(const float* scores, const std::uint32_t* position, int valid, Selector& selector,
                std::uint64_t* scratch);
  // Leaves the best min(count, keep) entries, in no order.
  void (*compact)(Selector& selector, std::uint64_t* scratch);
};

// The tables of this build, by falling priority, including those that this machine cannot run.
std::span<const Kernels* const> kernels();

}  // namespace misa::cpu
