// SPDX-License-Identifier: Apache-2.0
// The CPU backend's inner loops, one table an instruction set. Each stage's loops stand in its
// folder's cpu-inl.h; this is the seam between them and the code that is compiled once.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>

#include "misa/types.hpp"

namespace misa::cpu {

// What a tile and the query rows that meet it are made of. bf16 holds bf16 and e4m3 values exactly
// and is used where the instruction set multiplies it; everything else is f32.
enum class Operand : std::uint8_t { f32, bf16 };

constexpr std::size_t size_of(Operand operand) { return operand == Operand::f32 ? 4 : 2; }

// 64 keys with one key a lane, so that a key's dot product is summed over d in one fixed order
// whatever shares its tile: f32 [D][64], or bf16 [D/2][64][2].
struct alignas(64) Tile {
  float scale[kPageSize];             // multiplies the score of its key
  std::uint32_t position[kPageSize];  // of its key, relative to the query's sequence
  void* data;
  int dim;
  bool scaled;  // false: every scale is 1
};

// The rows that score for one query: routed heads ascending, then the rows of the residual.
struct QueryRows {
  const void* data;     // [count][D] operands
  const float* weight;  // [count]
  const float* floor;   // [count]: 0 for max(0, x); -inf for a linear row
  int count;
};

// Holds at least the `keep` best entries seen. An entry is a score and a position in one integer
// that is larger for a larger score and, of equal scores, for the lower position.
struct Selector {
  std::uint64_t* entries;  // [capacity]
  std::int64_t count;
  std::int64_t capacity;  // at least keep + kSelectorSlack
  std::int64_t keep;
  std::uint64_t threshold;  // only larger entries can still be among the best
};

// Room for the entries of one tile and for what a vector store writes beyond them.
inline constexpr std::int64_t kSelectorSlack = 2 * kPageSize;

// What a routed head is worth, from its dot products x with the sampled keys.
struct HeadFit {
  float* slope;         // [H] least-squares slope of max(0, x) on x
  float* nonlinearity;  // [H] rms of what the fit leaves over
  float* dispersion;    // [H] standard deviation of max(0, x)
};

struct Kernels {
  const char* name;  // the backend's name
  const char* isa;
  const char* requirement;
  int priority;
  bool native_bf16;
  bool (*available)();

  // cache: one row of D elements to operands; 64 rows (count of them real) to a tile.
  void (*convert)(const void* row, DType dtype, int dim, Operand operand, void* out);
  void (*pack)(const void* const* rows, DType dtype, int count, int dim, Operand operand,
               void* scratch, void* tile);

  // pool: sum[D] = or += the keys' values scale * row, in order.
  void (*add_keys)(const void* const* rows, const float* scale, DType dtype, int count, int dim,
                   float* sum);
  void (*add)(const float* addend, int dim, float* sum);

  // score: out[64] for the first `valid` keys (rounded up to whole vectors).
  void (*score)(Operand operand, const QueryRows& rows, const Tile& tile, int valid, float* out);
  // dot products, out[j * stride + key].
  void (*dots)(Operand operand, const void* rows, int count, const Tile& tile, int valid,
               std::int64_t stride, float* out);

  // route
  void (*add_energy)(const float* dots, std::int64_t stride, int heads, int valid,
                     const float* weight, float* energy);
  void (*fit)(const float* dots, std::int64_t stride, int heads, int count, const HeadFit& out);
  float (*sum_squares)(const void* row, DType dtype, float scale, int dim);
  void (*add_scaled)(float factor, const void* row, DType dtype, int dim, float* sum);

  // select: offers the first `valid` scores of a tile; scratch holds `capacity` entries.
  void (*offer)(const float* scores, const std::uint32_t* position, int valid, Selector& selector,
                std::uint64_t* scratch);
  // Leaves exactly min(count, keep) best entries, unordered.
  void (*compact)(Selector& selector, std::uint64_t* scratch);
};

// The tables of this build, by falling priority, whether this machine can run them or not.
std::span<const Kernels* const> kernels();

}  // namespace misa::cpu
