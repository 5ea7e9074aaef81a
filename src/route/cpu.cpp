// SPDX-License-Identifier: Apache-2.0
#include "route/cpu.hpp"

#include <algorithm>
#include <cmath>
#include <iterator>

#include "core/ceil_div.hpp"
#include "core/recipe.hpp"
#include "cpu/load.hpp"

namespace misa::cpu {
namespace {

// The inputs and scratch memory of the functions that compute the values of heads.
struct RouterInput {
  const Kernels& kernels;
  const Problem& problem;
  const RouteQuery& query;
  float sample_rms;  // of the elements of the sampled keys
  RouteScratch& scratch;
};

// |q_j|^2
float head_squares(const RouterInput& in, int j) {
  return in.kernels.sum_squares(in.problem.query(in.query.t, j), in.problem.q.dtype, 1.0F,
                                static_cast<int>(in.problem.q.dim));
}

void pooled_values(const RouterInput& in, std::span<float> values) {
  const Heads& heads = in.query.heads;
  const BlockMeans& means = in.query.means;
  float* dots = in.scratch.dots;
  std::ranges::fill(values, 0.0F);
  const auto add = [&](const Tile& tile, int valid) {
    in.kernels.dots(Operand::f32, heads.rows_f32, heads.count, tile, valid, kPageSize, dots);
    in.kernels.add_energy(dots, kPageSize, heads.count, valid, heads.weight, values.data());
  };
  for (std::size_t i = 0; i < means.whole.size(); ++i) {
    add(means.whole[i], valid_in_tile(i, means.whole_count));
  }
  if (means.partial != nullptr) {
    add(*means.partial, 1);
  }
}

void nonlinearity_values(const RouterInput& in, std::span<float> values) {
  const HeadFit& fit = in.scratch.fit;
  for (int j = 0; j < in.query.heads.count; ++j) {
    const float norm = std::sqrt(head_squares(in, j));
    const float chance = kFireChance * norm * in.sample_rms * (1.0F - fit.slope[j]);
    values[j] = std::abs(in.query.heads.weight[j]) * (fit.nonlinearity[j] + chance);
  }
}

void dispersion_values(const RouterInput& in, std::span<float> values) {
  for (int j = 0; j < in.query.heads.count; ++j) {
    values[j] = std::abs(in.query.heads.weight[j]) * in.scratch.fit.dispersion[j];
  }
}

void self_values(const RouterInput& in, std::span<float> values) {
  const Heads& heads = in.query.heads;
  Tile& last = in.scratch.last_key;
  float* dots = in.scratch.dots;
  load_page(in.kernels, in.problem, in.query.t, in.query.n - 1, 1, heads.operand, in.scratch.pack,
            last);
  in.kernels.dots(heads.operand, heads.rows, heads.count, last, 1, kPageSize, dots);
  for (int j = 0; j < heads.count; ++j) {
    const float x = dots[j * kPageSize];
    values[j] = heads.weight[j] * (x < 0 ? 0 : x);
  }
}

void qnorm_values(const RouterInput& in, std::span<float> values) {
  for (int j = 0; j < in.query.heads.count; ++j) {
    values[j] = head_squares(in, j);  // ranks heads as |q_j| does
  }
}

void weight_values(const RouterInput& in, std::span<float> values) {
  for (int j = 0; j < in.query.heads.count; ++j) {
    values[j] = std::abs(in.query.heads.weight[j]);
  }
}

// The functions that compute the value of each head, indexed by Router; null for routers that rank
// no heads.
using Values = void (*)(const RouterInput&, std::span<float> values);
constexpr Values kValues[] = {nullptr,     pooled_values, nonlinearity_values, dispersion_values,
                              self_values, qnorm_values,  weight_values,       nullptr};
static_assert(std::size(kValues) == kRouters.size());

// Loads the keys of the query's sample grid, up to the `longest` keys of its sequence, unless they
// are loaded already.
void load_samples(const RouterInput& in) {
  const RouteQuery& query = in.query;
  SampledKeys& samples = in.scratch.samples;
  const std::int64_t stride = sample_stride(query.n);
  if (stride == samples.stride && sample_count(query.n) <= samples.count) {
    return;
  }
  samples.stride = stride;
  samples.count = std::min(ceil_div(query.longest, stride), kMaxSamples);
  for (std::int64_t first = 0; first < samples.count; first += kPageSize) {
    std::uint32_t positions[kPageSize];
    const std::int64_t in_tile = std::min<std::int64_t>(kPageSize, samples.count - first);
    for (std::int64_t i = 0; i < in_tile; ++i) {
      const std::int64_t position = (first + i) * stride;
      positions[i] = static_cast<std::uint32_t>(position);
      const Key key = in.problem.key(query.t, position);
      samples.squares[first + i] = in.kernels.sum_squares(key.data, in.problem.k_dtype(), key.scale,
                                                          static_cast<int>(in.problem.q.dim));
    }
    load_tile(in.kernels, in.problem, query.t, {positions, static_cast<std::size_t>(in_tile)},
              query.heads.operand, in.scratch.pack, samples.tiles[first / kPageSize]);
  }
}

// Fits each head on the sampled keys that the query sees, and computes the rms of these keys'
// elements.
void fit_heads(RouterInput& in) {
  load_samples(in);
  const Heads& heads = in.query.heads;
  const SampledKeys& samples = in.scratch.samples;
  const std::int64_t count = sample_count(in.query.n);
  for (std::int64_t first = 0; first < count; first += kPageSize) {
    const auto tile = static_cast<std::size_t>(first / kPageSize);
    in.kernels.dots(heads.operand, heads.rows, heads.count, samples.tiles[tile],
                    valid_in_tile(tile, count), kMaxSamples, in.scratch.dots + first);
  }
  in.kernels.fit(in.scratch.dots, kMaxSamples, heads.count, static_cast<int>(count),
                 in.scratch.fit);
  float squares = 0;
  for (std::int64_t i = 0; i < count; ++i) {
    squares += samples.squares[i];
  }
  in.sample_rms = std::sqrt(squares / static_cast<float>(count * in.problem.q.dim));
}

std::span<const std::int32_t> active_heads(const RouterInput& in) {
  const IndexerConfig& config = in.problem.config;
  const Values values_of = kValues[static_cast<std::size_t>(config.router)];
  if (values_of == nullptr) {
    std::int32_t* heads = in.scratch.ranking.indices;
    std::ranges::copy(config.static_heads, heads);
    std::sort(heads, heads + config.heads);
    return {heads, static_cast<std::size_t>(config.heads)};
  }
  const std::span values(in.scratch.values, static_cast<std::size_t>(in.query.heads.count));
  values_of(in, values);
  return top_indices(values, config.heads, in.scratch.ranking);
}

// The sum of w_j slope_j q_j over the heads that are not active.
std::span<const float> residual_row(const RouterInput& in, std::span<const std::int32_t> active) {
  const Problem& problem = in.problem;
  float* row = in.scratch.residual;
  std::fill_n(row, problem.q.dim, 0.0F);
  auto next = active.begin();
  for (std::int64_t j = 0; j < problem.q.heads; ++j) {
    if (next != active.end() && *next == j) {
      ++next;
      continue;
    }
    in.kernels.add_scaled(problem.weight(in.query.t, j) * in.scratch.fit.slope[j],
                          problem.query(in.query.t, j), problem.q.dtype,
                          static_cast<int>(problem.q.dim), row);
  }
  return {row, static_cast<std::size_t>(problem.q.dim)};
}

}  // namespace

RouteScratch take_route_scratch(Arena& arena, Router router, bool sampled, Operand operand,
                                std::int64_t heads, std::int64_t dim, void* pack) {
  RouteScratch scratch{};
  if (sampled) {
    for (Tile& tile : scratch.samples.tiles) {
      tile = take_tile(arena, operand, dim);
    }
    scratch.samples.squares = arena.take<float>(kMaxSamples);
    scratch.fit = {arena.take<float>(heads), arena.take<float>(heads), arena.take<float>(heads)};
  }
  if (traits_of(router).keys == RouterKeys::last) {
    scratch.last_key = take_tile(arena, operand, dim);
  }
  scratch.pack = pack;
  scratch.dots = arena.take<float>(heads * kMaxSamples);
  scratch.values = arena.take<float>(heads);
  scratch.ranking = take_ranking_scratch(arena, heads);
  scratch.residual = arena.take<float>(dim);
  return scratch;
}

Routed route(const Kernels& kernels, const Problem& problem, const RouteQuery& query,
             RouteScratch& scratch) {
  RouterInput in{kernels, problem, query, 0, scratch};
  if (query.sampled) {
    fit_heads(in);
  }
  Routed routed;
  routed.active = active_heads(in);
  if (problem.config.residual) {
    routed.residual = residual_row(in, routed.active);
  }
  return routed;
}

}  // namespace misa::cpu
