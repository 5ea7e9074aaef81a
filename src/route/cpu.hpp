// SPDX-License-Identifier: Apache-2.0
// Routing for the CPU backend: the active heads and the residual row of one query.
#pragma once

#include <cstdint>
#include <span>

#include "core/arena.hpp"
#include "core/problem.hpp"
#include "cpu/heads.hpp"
#include "cpu/kernels.hpp"
#include "cpu/ranking.hpp"

namespace misa::cpu {

// The keys of one sample grid of a sequence. All queries of the sequence with that grid share them.
struct SampledKeys {
  Tile tiles[2];        // operands
  float* squares;       // [128] |k|^2
  std::int64_t stride;  // of the grid; 0: nothing is loaded
  std::int64_t count;
};

// Scratch memory for routing a query. Pointers to memory that no query of the plan needs are null.
struct RouteScratch {
  SampledKeys samples;
  Tile last_key;  // operands
  void* pack;     // [64][D] operands
  float* dots;    // [H][128]
  HeadFit fit;
  float* values;           // [H]
  RankingScratch ranking;  // of H values
  float* residual;         // [D]
};

// `sampled`: some query's routing looks at its sample grid. `pack` may be shared with other stages.
RouteScratch take_route_scratch(Arena& arena, Router router, bool sampled, Operand operand,
                                std::int64_t heads, std::int64_t dim, void* pack);

// A query and what its routing looks at.
struct RouteQuery {
  std::int64_t t;
  std::int64_t n;        // keys that it sees
  std::int64_t longest;  // keys of its sequence that may be loaded: n or more
  bool sampled;          // its routing looks at its sample grid
  const Heads& heads;
  const BlockMeans& means;  // where the router looks at block means
};

struct Routed {
  std::span<const std::int32_t> active;  // [h] heads, ascending
  std::span<const float> residual;       // [D], empty without one
};

// The result lies in the scratch. The caller sets samples.stride to 0 before it routes queries of
// another sequence.
Routed route(const Kernels& kernels, const Problem& problem, const RouteQuery& query,
             RouteScratch& scratch);

}  // namespace misa::cpu
