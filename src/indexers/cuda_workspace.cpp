// SPDX-License-Identifier: Apache-2.0
#include "indexers/cuda_workspace.hpp"

#include <algorithm>

#include "core/sketch.hpp"
#include "cuda/sm90.hpp"
#include "filter/generic.hpp"
#include "pool/generic.hpp"
#include "score/sm90_fp8.hpp"

namespace misa::cuda {
namespace {

constexpr std::int64_t kFloatsPerCandidate = sizeof(Candidate) / sizeof(float);

fused::WorkPlan work_plan_for(const PassSpec& spec, const Shape& chunk, std::int64_t total_keys,
                              const DeviceTraits& device) {
  return fused::plan_work({chunk.tokens, std::max<std::int64_t>(total_keys, 1), chunk.max_keys,
                           spec.rows(), spec.keep, device.num_sms});
}

score::RowOperands take_rows(const Shape& chunk, std::int32_t heads, bool residual, int sketch,
                             Arena& arena) {
  score::RowOperands rows = score::row_operands_for(chunk, heads, residual, sketch);
  const std::int64_t count = chunk.tokens * rows.padded();
  rows.data =
      arena.take<std::byte>(count * rows.dim * static_cast<std::int64_t>(size_of(rows.operand)));
  rows.weight = arena.take<float>(count);
  return rows;
}

score::SketchOperands take_sketch_rows(const Shape& chunk, const PassSpec& spec, Arena& arena) {
  const std::int64_t count = chunk.tokens * spec.heads;
  score::SketchOperands rows{};
  rows.rows = arena.take<std::uint8_t>(count * chunk.dim);
  rows.factors = arena.take<float>(count);
  if (spec.recipe.residual) {
    rows.residual = arena.take<std::uint8_t>(chunk.tokens * chunk.dim);
    rows.residual_factors = arena.take<float>(chunk.tokens);
  }
  rows.dim = static_cast<std::int32_t>(chunk.dim);
  rows.heads = spec.heads;
  rows.sm90 = spec.sm90_scores;
  return rows;
}

std::span<std::byte> take_bytes(std::size_t bytes, Arena& arena) {
  return arena.take_span<std::byte>(static_cast<std::int64_t>(bytes));
}

}  // namespace

PassSpec::PassSpec(const IndexerConfig& config, const Shape& shape, bool paged,
                   const DeviceTraits& device)
    : recipe(largest_recipe(config, shape.heads, shape.max_keys)),
      sketch(recipe.sketched ? config.sketch : 0),
      heads(static_cast<std::int32_t>(recipe.heads)),
      keep(static_cast<std::int32_t>(recipe.keep)),
      columns(recipe.scored) {
  // Hopper's kernels round otherwise than the generic ones: which of them score must not depend on
  // lengths.
  const auto sm90 = [&](std::int64_t scoring_rows) {
    return sm90_can_implement(device, shape.q_dtype, shape.k_dtype, shape.dim, scoring_rows);
  };
  // Those for sketches score all keys, which a filter leaves to do only in short rows.
  sm90_scores = sm90(rows()) && (sketch == 0 || config.filter_block == 0);
  fused = sm90_scores && !recipe.filtered && !paged;
  sm90_rerank = recipe.reranked && sm90(shape.heads);
}

FusedWorkspace::FusedWorkspace(const PassSpec& spec, const Shape& chunk, std::int64_t total_keys,
                               const DeviceTraits& device, Arena& arena)
    : work_plan(work_plan_for(spec, chunk, total_keys, device)) {
  samples = arena.take_span<float>(chunk.tokens * work_plan.samples);
  thresholds = arena.take<float>(chunk.tokens);
  const std::int64_t lists = chunk.tokens * work_plan.lists;
  fallback_scores = arena.take_span<float>(
      std::max(lists * work_plan.capacity * kFloatsPerCandidate, chunk.max_keys));
  counts = arena.take_span<std::uint32_t>(lists);
  fallback = {arena.take<std::int32_t>(chunk.tokens), arena.take<std::uint32_t>(1),
              arena.take<std::uint32_t>(chunk.tokens)};
}

void FusedWorkspace::fit(const PassSpec& spec, Shape chunk, std::int64_t total_keys,
                         const DeviceTraits& device) {
  chunk.max_keys = std::min(chunk.max_keys, total_keys);
  const fused::WorkPlan best = work_plan_for(spec, chunk, total_keys, device);
  const std::int64_t lists = chunk.tokens * best.lists;
  if (chunk.tokens * best.samples <= std::ssize(samples) && lists <= std::ssize(counts) &&
      lists * best.capacity * kFloatsPerCandidate <= std::ssize(fallback_scores)) {
    work_plan = best;
  }
  work_plan.samples = (total_keys + work_plan.sample_stride - 1) / work_plan.sample_stride;
  candidates = {reinterpret_cast<Candidate*>(fallback_scores.data()), counts.data(),
                static_cast<std::uint32_t>(work_plan.lists), work_plan.capacity};
}

ChunkWorkspace::ChunkWorkspace(const IndexerConfig& config, const Shape& chunk,
                               const KeyBounds& keys, const DeviceTraits& device,
                               std::byte* memory) {
  const PassSpec spec(config, chunk, keys.paged, device);
  const std::int64_t queries = chunk.tokens;
  Arena arena(memory, kDeviceAlignment);
  if (config.router != Router::all) {
    routing.heads = arena.take<std::int32_t>(queries * config.heads);
    if (config.residual) {
      routing.residual = arena.take<float>(queries * chunk.dim);
      routing.rounded = arena.take<std::uint8_t>(queries * chunk.dim);
      routing.rounded_scale = arena.take<float>(queries);
    }
    if (traits_of(config.router).keys == RouterKeys::block_means) {
      route_means = take_bytes(pool::workspace_bytes(chunk, keys, config.block, true), arena);
    }
  }
  if (spec.recipe.filtered) {
    blocks = arena.take<std::int32_t>(queries * config.filter_blocks);
    filter = take_bytes(filter::workspace_bytes(config, chunk), arena);
    filter_means =
        take_bytes(pool::workspace_bytes(chunk, keys, config.filter_block, false), arena);
  }
  if (spec.needs_scales(keys.paged)) {
    scales = arena.take<float>(score::scale_count(keys.total));
  }
  if (spec.needs_sketch_keys(keys.paged)) {
    sketch_keys = {arena.take<std::uint8_t>(keys.total * chunk.dim),
                   arena.take<float>(score::scale_count(keys.total))};
  }
  if (!spec.sm90_scores) {
    rows = take_rows(chunk, spec.heads, spec.recipe.residual, spec.sketch, arena);
  }
  if (spec.sketch != 0 && !keys.paged && !spec.sm90_scores) {
    sketches = arena.take<std::uint8_t>(sketch_page_bytes(spec.sketch, chunk.dim, keys.total));
  }
  if (is_rotated(spec.sketch) || (spec.sketch != 0 && spec.sm90_scores)) {
    sketch_rows = take_sketch_rows(chunk, spec, arena);
  }
  if (spec.fused) {
    fused = FusedWorkspace(spec, chunk, keys.total, device, arena);
  } else {
    scores = {arena.take<float>(queries * spec.columns), spec.columns};
    lengths = arena.take<std::int32_t>(queries);
  }
  indices = arena.take<std::int32_t>(queries * config.top_k);
  if (spec.recipe.reranked) {
    if (!spec.sm90_rerank) {
      all_rows = take_rows(chunk, static_cast<std::int32_t>(chunk.heads), false, 0, arena);
    }
    candidates = arena.take<std::int32_t>(queries * spec.keep);
    candidate_scores = {arena.take<float>(queries * spec.keep), spec.keep};
    candidate_lengths = arena.take<std::int32_t>(queries);
  }
  bytes = arena.used();
}

}  // namespace misa::cuda
