// SPDX-License-Identifier: Apache-2.0
// The indexers on a CUDA device. Queries are taken in chunks whose scores fit the workspace:
//
//  1. route   active heads and the residual row
//  2. filter  the blocks that each query keeps
//  3. score   scores [chunk, columns]: a column per position, or per position of the kept blocks;
//             from the keys' sketches, if the config has them. Those of ragged keys are written
//             into the workspace first, once a call.
//  4. select  the top k of each row; if re-ranking follows, the top m
//  5. rerank  scores [chunk, m] over all heads, of which the top k are selected
//
// Where Hopper's kernels can score ragged keys, and no block is filtered, they do 3 and 4 at once
// (Chunk::score_and_select). If a config computes short rows as DSA (dense_work), there are two
// passes over the queries, and each treats the rows of the other as empty.
//
// How queries are cut into chunks never changes a result.
#include "indexers/cuda.hpp"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "core/sketch.hpp"
#include "cuda/check.cuh"
#include "cuda/stages.hpp"
#include "filter/generic.hpp"
#include "fused/sm90_fp8.hpp"
#include "fused/sm90_fp8_config.cuh"
#include "indexers/cuda_workspace.hpp"
#include "misa/cuda.hpp"
#include "misa/error.hpp"
#include "pool/generic.hpp"
#include "route/generic.hpp"
#include "score/columns.hpp"
#include "score/generic.hpp"
#include "score/sketch_keys.hpp"
#include "score/sm90_fp8.hpp"
#include "score/sm90_paged.hpp"
#include "select/gate.hpp"
#include "select/generic.hpp"
#include "select/indices.hpp"

namespace misa::cuda {
namespace {

// No limit to a row's length.
constexpr std::int32_t kAll = std::numeric_limits<std::int32_t>::max();

// More queries at once would only take more memory: 4096 queries are already 128 groups of 32 for
// each tile of keys.
constexpr std::int64_t kMaxChunk = 4096;

Shape with_tokens(Shape shape, std::int64_t tokens) {
  shape.tokens = tokens;
  return shape;
}

std::size_t bytes_for(const IndexerConfig& config, const Shape& chunk, const KeyBounds& keys,
                      const DeviceTraits& device) {
  return ChunkWorkspace(config, chunk, keys, device, nullptr).bytes;
}

// Row `first` of an output; null if the output is not requested.
template <class T>
T* row_of(std::span<T> output, std::int64_t first, std::int64_t width) {
  return output.empty() ? nullptr : output.data() + first * width;
}

template <class T>
void fill(std::span<T> output, int byte, cudaStream_t stream) {
  if (!output.empty()) {
    check(cudaMemsetAsync(output.data(), byte, output.size_bytes(), stream), "cudaMemsetAsync");
  }
}

// Outputs from the row of a chunk's first query on; null if not requested.
struct ChunkOutputs {
  TopK top_k;
  std::int32_t* heads;
  float* residual;
};

// One chunk of queries: the stages in order.
template <class Source>
class Chunk {
 public:
  // `empty`: rows of queries that see nothing are written, else they are left as they are.
  Chunk(const IndexerConfig& config, const PassSpec& spec, const ProblemOf<Source>& problem,
        const ChunkWorkspace& workspace, const DeviceTraits& device, bool empty, Stages& stages,
        cudaStream_t stream)
      : config_(config),
        spec_(spec),
        problem_(problem),
        workspace_(workspace),
        device_(device),
        empty_(empty),
        stages_(stages),
        stream_(stream) {}

  void run(ChunkOutputs out) {
    Routing& routing = workspace_.routing;
    if (out.top_k.indices == nullptr) {
      out.top_k.indices = workspace_.indices;
      out.top_k.index_stride = config_.top_k;
    }
    routing.heads = out.heads != nullptr ? out.heads : routing.heads;
    routing.residual = out.residual != nullptr ? out.residual : routing.residual;
    const bool reported = out.heads != nullptr || out.residual != nullptr;
    if (spec_.recipe.active || (config_.router != Router::all && reported)) {
      stages_.enter("route");
      route();
    }
    Columns columns{nullptr, 0, 1};
    if (spec_.recipe.filtered) {
      stages_.enter("filter");
      columns = filter();
    }
    // A row that is selected whole is scored only to report its scores.
    const std::int32_t whole = out.top_k.scores == nullptr ? config_.top_k : 0;
    const bool reranked = spec_.recipe.reranked;
    const TopK first = reranked ? TopK{workspace_.candidates, nullptr} : out.top_k;
    if (spec_.fused) {
      if constexpr (!kPaged<Source>) {
        score_and_select(first);
      }
      if (reranked) {
        write_lengths(columns);
      }
    } else {
      stages_.enter("score");
      // Paged scoring writes them itself.
      if (!kPaged<Source> || !spec_.sm90_scores || columns.list != nullptr) {
        write_lengths(columns);
      }
      if (spec_.sketch != 0) {
        score_sketches(columns);
      } else {
        score(active_rows(), workspace_.rows, spec_.sm90_scores, columns, workspace_.lengths,
              reranked ? spec_.keep : whole, workspace_.scores);
      }
      select(columns, workspace_.scores, workspace_.lengths, spec_.keep, first);
    }
    if (reranked) {
      stages_.enter("rerank");
      const Columns candidates{workspace_.candidates, spec_.keep, 1};
      score(all_rows(), workspace_.all_rows, spec_.sm90_rerank, candidates,
            workspace_.candidate_lengths, whole, workspace_.candidate_scores);
      select(candidates, workspace_.candidate_scores, workspace_.candidate_lengths, config_.top_k,
             out.top_k);
    }
  }

 private:
  // Step 1, from block means where the router looks at them.
  void route() const {
    BlockMeanTable means{};
    const bool wanted = traits_of(config_.router).keys == RouterKeys::block_means;
    if (wanted) {
      means = pool::launch(problem_, config_.block, true, workspace_.route_means, device_.num_sms,
                           stream_);
    }
    route::launch(problem_, config_, device_, wanted ? &means : nullptr, workspace_.routing,
                  stream_);
  }

  // Step 2: the columns that are scored.
  Columns filter() const {
    const std::span<std::byte> room =
        filter::reads_means(problem_, device_) ? workspace_.filter_means : std::span<std::byte>{};
    const BlockMeanTable means =
        pool::launch(problem_, config_.filter_block, false, room, device_.num_sms, stream_);
    filter::launch(problem_, config_, device_, means, workspace_.blocks, workspace_.filter,
                   stream_);
    return {workspace_.blocks, config_.filter_blocks, config_.filter_block};
  }

  // How long the rows of the first scores are, and those of a re-rank.
  [[nodiscard]] score::RowLengths row_lengths() const {
    return {workspace_.lengths, workspace_.candidate_lengths, spec_.keep};
  }
  void write_lengths(const Columns& columns) const {
    score::launch_row_lengths(problem_.k, problem_.q.tokens, columns, row_lengths(), stream_);
  }

  // The rows that give the first scores; then, those that score the candidates of a re-rank.
  [[nodiscard]] score::ActiveRows active_rows() const {
    const Routing& routing = workspace_.routing;
    return {spec_.recipe.active ? routing.heads : nullptr, spec_.heads,
            spec_.recipe.residual ? routing.rounded : nullptr, routing.rounded_scale};
  }
  [[nodiscard]] score::ActiveRows all_rows() const {
    return {nullptr, static_cast<int>(problem_.q.heads), nullptr, nullptr};
  }

  // Steps 3 and 4 at once: gate thresholds from sampled scores, the scores above them, and the top
  // k of these. Then the fallback rows, from all of their scores.
  void score_and_select(const TopK& out) const {
    const FusedWorkspace& fused = workspace_.fused;
    const fused::WorkPlan& work_plan = fused.work_plan;
    const bool sketched = spec_.sketch != 0;
    if (sketched) {
      write_sketch_rows();
    }
    const score::ActiveRows rows =
        sketched ? score::rows_of(workspace_.sketch_rows) : active_rows();
    const ProblemOf<Source> problem = sketched ? sketch_problem() : problem_;
    const float* scales = sketched ? workspace_.sketch_keys.scales : workspace_.scales;
    const Source& keys = problem.k;
    const std::int64_t queries = problem_.q.tokens;
    stages_.enter("samples");
    fused::launch_samples(problem, rows, work_plan, scales, fused.samples.data(), stream_);
    stages_.enter("threshold");
    select::launch_threshold({fused.samples.data(), work_plan.samples, work_plan.samples}, keys,
                             queries, spec_.keep, fused.thresholds, fused.fallback, stream_);
    stages_.enter("candidates");
    fused::launch_candidates(problem, rows, work_plan, scales, fused.thresholds, fused.candidates,
                             stream_);
    stages_.enter("survivors");
    select::launch_survivors(fused.candidates, keys, queries, spec_.keep, out, empty_,
                             fused.fallback, stream_);
    stages_.enter("fallback");
    fused::launch_fallback(problem, rows, scales, fused.fallback, spec_.keep, out,
                           fused.fallback_scores, device_, stream_);
  }

  // Step 3. `operands`: room for the rows where the generic kernels score.
  void score(const score::ActiveRows& rows, const score::RowOperands& operands, bool sm90,
             const Columns& columns, const std::int32_t* lengths, std::int32_t unscored,
             const Scores& scores) const {
    if (sm90 && columns.list == nullptr) {
      if constexpr (kPaged<Source>) {
        score::launch_paged(problem_, rows, unscored, scores, row_lengths(), device_.num_sms,
                            stream_);
      }
    } else if (sm90) {
      score::launch_gathered(problem_, rows, columns, lengths, unscored, workspace_.scales, scores,
                             device_.num_sms, stream_);
    } else {
      score::launch_row_operands(problem_, rows.heads != nullptr ? &workspace_.routing : nullptr,
                                 operands, stream_);
      score::launch_generic(problem_, operands, columns, unscored, 0, scores, stream_);
    }
  }

  // The rows that score sketches.
  void write_sketch_rows() const {
    score::launch_sketch_operands(problem_.q, problem_.w,
                                  spec_.recipe.active ? &workspace_.routing : nullptr, spec_.sketch,
                                  workspace_.sketch_rows, stream_);
  }

  // Their problem: what the sketches of ragged keys stand for, in place of the keys.
  [[nodiscard]] Problem sketch_problem() const {
    Problem problem = score::rows_problem(problem_, workspace_.sketch_rows);
    problem.k.data = workspace_.sketch_keys.rows;
    problem.k.stride = problem_.q.dim;
    problem.k.scale = workspace_.sketch_keys.scales;
    return problem;
  }

  // Step 3 with the keys' sketches. Rows that see at most the candidates are not scored.
  void score_sketches(const Columns& columns) const {
    if (spec_.sm90_scores) {
      if constexpr (kPaged<Source>) {
        write_sketch_rows();
        score::launch_paged_sketch(problem_, spec_.sketch, workspace_.sketch_rows, spec_.keep,
                                   workspace_.scores, row_lengths(), device_.num_sms, stream_);
      }
      return;
    }
    if (is_rotated(spec_.sketch)) {
      write_sketch_rows();
      score::launch_row_operands(workspace_.sketch_rows, problem_.q.tokens, workspace_.rows,
                                 stream_);
    } else {
      score::launch_row_operands(problem_, spec_.recipe.active ? &workspace_.routing : nullptr,
                                 workspace_.rows, stream_);
    }
    score::launch_generic(problem_, workspace_.rows, columns, spec_.keep, spec_.sketch,
                          workspace_.scores, stream_);
  }

  // Step 4.
  void select(const Columns& columns, const Scores& scores, const std::int32_t* lengths,
              std::int32_t count, const TopK& out) const {
    stages_.enter("select");
    const Logits logits{scores.data, problem_.q.tokens, scores.columns, scores.columns, lengths};
    if (scores.columns <= select::kShortColumns) {
      select::launch_short(logits, problem_.k, columns, count, out, empty_, stream_);
      return;
    }
    select::launch_generic(logits, count, out, empty_, device_.num_sms, stream_);
    if (columns.list != nullptr) {
      score::launch_positions(problem_.k, problem_.q.tokens, columns, out.indices, count,
                              out.index_stride != 0 ? out.index_stride : count, stream_);
    }
  }

  const IndexerConfig& config_;
  const PassSpec& spec_;
  ProblemOf<Source> problem_;
  ChunkWorkspace workspace_;
  const DeviceTraits& device_;
  bool empty_;
  Stages& stages_;
  cudaStream_t stream_;
};

}  // namespace

std::vector<Step::Pass> Step::passes(const IndexerConfig& config, const Shape& shape) {
  const std::int64_t dense = std::min<std::int64_t>(dense_keys(config, shape.heads), kAll);
  std::vector<Pass> passes;
  if (dense == 0 || dense < shape.max_keys) {
    IndexerConfig routed = effective_config(config, shape.heads);
    if (routes_every_head(config, shape.heads)) {
      routed.router = Router::weight;  // the cheapest router that reports which heads are active
      routed.heads = config.heads;
    }
    passes.push_back({routed, static_cast<std::int32_t>(dense > 0 ? dense + 1 : 0), kAll, shape});
  }
  if (dense > 0) {
    IndexerConfig every_head = IndexerConfig::dsa(config.top_k);
    every_head.ordered = config.ordered;
    passes.push_back({every_head, 0, static_cast<std::int32_t>(dense), shape});
  }
  return passes;
}

std::size_t Step::least_bytes(const IndexerConfig& config, const Shape& shape,
                              const KeyBounds& keys, const DeviceTraits& device) {
  std::size_t bytes = 0;
  for (const Pass& pass : passes(config, shape)) {
    bytes = std::max(bytes, bytes_for(pass.config, with_tokens(shape, 1), keys, device));
  }
  return bytes;
}

Step::Step(const IndexerConfig& config, const Shape& shape, const KeyBounds& keys,
           std::size_t workspace_cap, const DeviceTraits& device)
    : passes_(passes(config, shape)), keys_(keys), device_(device) {
  for (const Pass& pass : passes_) {
    const PassSpec spec(pass.config, shape, keys.paged, device);
    for (const int wanted : {pass.config.top_k, spec.keep}) {
      if (wanted > kMaxTopK) {
        throw Error(ErrorCode::unsupported,
                    fmt::format("top_k, candidates: expected at most {} on a CUDA backend, got {}",
                                kMaxTopK, wanted));
      }
    }
    if (!keys.paged && (spec.sm90_scores || spec.sm90_rerank) && keys.total > fused::kMaxKeys) {
      throw Error(ErrorCode::unsupported,
                  fmt::format("total_keys: expected at most {} of e4m3 on this backend, got {}",
                              fused::kMaxKeys, keys.total));
    }
  }
  const std::size_t least = least_bytes(config, shape, keys, device);
  if (least > workspace_cap) {
    throw Error(ErrorCode::workspace,
                fmt::format("workspace cap: expected at least {} bytes for this shape, got {}",
                            least, workspace_cap));
  }
  for (Pass& pass : passes_) {
    std::int64_t fits = 1;
    std::int64_t too_many = std::clamp<std::int64_t>(shape.tokens, 1, kMaxChunk) + 1;
    while (too_many - fits > 1) {
      const std::int64_t middle = std::midpoint(fits, too_many);
      const bool fit =
          bytes_for(pass.config, with_tokens(shape, middle), keys, device) <= workspace_cap;
      (fit ? fits : too_many) = middle;
    }
    pass.chunk.tokens = fits;
  }
}

std::size_t Step::workspace_bytes() const {
  std::size_t bytes = 0;
  for (const Pass& pass : passes_) {
    bytes = std::max(bytes, bytes_for(pass.config, pass.chunk, keys_, device_));
  }
  return bytes;
}

// Only the generic kernels compute sketches that the cache does not have.
void Step::require_sketch(const DevicePagedSource& keys) const {
  for (const Pass& pass : passes_) {
    const PassSpec spec(pass.config, pass.chunk, keys_.paged, device_);
    if (spec.sketch != 0 && spec.sm90_scores && keys.sketch == nullptr) {
      throw Error(ErrorCode::invalid_argument,
                  fmt::format("cache: expected sketches of {} bits, as configured, which this "
                              "backend reads from the cache; got none of so many bits",
                              spec.sketch));
    }
  }
}

template <class Source>
void Step::run(const ProblemOf<Source>& problem, const Selection& out, std::byte* workspace,
               void* stream) const {
  if constexpr (kPaged<Source>) {
    require_sketch(problem.k);
  }
  const auto on = static_cast<cudaStream_t>(stream);
  Stages stages;
  // Padding of heads and residual rows. A pass that writes either one pads it for the queries of
  // the other pass too; what no pass writes is padded here.
  const IndexerConfig& routed = passes_.front().config;
  if (routed.router == Router::all) {
    fill(out.heads, 0xFF, on);
  }
  if (!routed.residual) {
    fill(out.residual, 0, on);
  }
  for (const Pass& pass : passes_) {
    const IndexerConfig& config = pass.config;
    const PassSpec spec(config, pass.chunk, keys_.paged, device_);
    const ChunkWorkspace planned(config, pass.chunk, keys_, device_, workspace);
    ProblemOf<Source> seen = problem;
    seen.k.least_keys = pass.least;
    seen.k.most_keys = pass.most;
    if constexpr (!kPaged<Source>) {
      if (spec.needs_scales(false)) {
        stages.enter("scales");
        score::launch_scales(seen.k, planned.scales, on);
      }
      if (spec.needs_sketch_keys(false)) {
        stages.enter("sketches");
        score::launch_sketch_keys(seen.k, spec.sketch, planned.sketch_keys, on);
      } else if (spec.sketch != 0) {
        stages.enter("sketches");
        score::launch_sketches(seen.k, spec.sketch, seen.q.dim, planned.sketches, on);
        seen.k.sketch = planned.sketches;
      }
    }
    const bool first_pass = &pass == &passes_.front();
    for (std::int64_t first = 0; first < seen.q.tokens; first += pass.chunk.tokens) {
      const std::int64_t count = std::min(pass.chunk.tokens, seen.q.tokens - first);
      ChunkWorkspace fitted = planned;
      if constexpr (!kPaged<Source>) {
        if (spec.fused) {
          fitted.fused.fit(spec, with_tokens(pass.chunk, count), seen.k.tokens, device_);
        }
      }
      const ChunkOutputs outputs{
          {row_of(out.indices, first, out.index_stride),
           row_of(out.scores, first, out.score_stride), out.index_stride, out.score_stride},
          row_of(out.heads, first, config.heads),
          config.residual ? row_of(out.residual, first, seen.q.dim) : nullptr};
      Chunk(config, spec, chunk_of(seen, first, count), fitted, device_, first_pass, stages, on)
          .run(outputs);
    }
  }
  if (!out.indices.empty() && (out.slots || !out.offsets.empty())) {
    stages.enter("indices");
    select::launch_indices(problem.k, problem.q.tokens, passes_.front().config.top_k, out, stream);
  }
}

template void Step::run(const Problem&, const Selection&, std::byte*, void*) const;
template void Step::run(const PagedProblem&, const Selection&, std::byte*, void*) const;

}  // namespace misa::cuda
