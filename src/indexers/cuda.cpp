// SPDX-License-Identifier: Apache-2.0
// The indexers on a CUDA device. Queries are taken in slabs whose scores fit the workspace:
//
//  1. route   active heads and the residual row
//  2. filter  the blocks that are kept
//  3. score   [slab, columns]: columns are positions, or those of the kept blocks
//  4. select  the top k of each row; or the top m, whose scores over all heads are then
//  5. rerank  [slab, m], of which the top k are selected
//
// Where the device has kernels of src/fused for the shape, those score, and do 3 and 4 at once
// unless blocks were filtered (Slab::fused).
//
// Where a config says that rows of little work take every head, there are two passes over the
// queries, each of which takes the rows of the other as empty.
//
// How queries are cut into slabs never changes a result.
#include "indexers/cuda.hpp"

#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "core/problem.hpp"
#include "cuda/check.cuh"
#include "cuda/sm90.hpp"
#include "cuda/stages.hpp"
#include "filter/generic.hpp"
#include "fused/sm90_fp8.hpp"
#include "fused/sm90_fp8_config.cuh"
#include "misa/cuda.hpp"
#include "misa/error.hpp"
#include "pool/generic.hpp"
#include "rerank/generic.hpp"
#include "route/generic.hpp"
#include "score/generic.hpp"
#include "score/sm90_fp8.hpp"
#include "select/fused.hpp"
#include "select/generic.hpp"

namespace misa::cuda {
namespace {

// No limit to a row's length.
constexpr std::int32_t kAll = std::numeric_limits<std::int32_t>::max();

// More queries at once only add memory: these are 128 groups of 32 for each tile of keys.
constexpr std::int64_t kMaxSlab = 4096;

// Hands out pieces of one buffer, or counts what they would take.
class Bump {
 public:
  explicit Bump(std::byte* base) : base_(base) {}

  template <class T>
  T* take(std::int64_t count) {
    constexpr std::size_t kAlign = 256;  // what device memory is aligned to
    const std::size_t at = used_;
    used_ += (sizeof(T) * static_cast<std::size_t>(count) + kAlign - 1) / kAlign * kAlign;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }

  std::span<std::byte> take_bytes(std::size_t bytes) {
    return {take<std::byte>(static_cast<std::int64_t>(bytes)), bytes};
  }

  [[nodiscard]] std::size_t used() const { return used_; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

// Which stages there are and how wide, from shapes alone.
struct Needs {
  bool filtered;
  bool reranked;
  bool routed;           // the first scores are those of routed heads
  bool linear;           // and of a residual row
  bool fp8;              // the first scores come from the kernels of src/fused
  bool fused;            // and are selected from as they are made
  bool rerank_fp8;       // the last ones come from there
  std::int32_t heads;    // of the first scores
  std::int64_t columns;  // of the first scores
  std::int32_t keep;     // of them

  Needs(const IndexerConfig& config, const Shape& shape, const Device& device) {
    const auto all = static_cast<std::int32_t>(shape.heads);
    const auto blocks = [&](std::int64_t size) { return (shape.max_keys + size - 1) / size; };
    filtered = config.filter_block > 0 && blocks(config.filter_block) > config.filter_blocks;
    columns = filtered ? std::int64_t{config.filter_block} * config.filter_blocks : shape.max_keys;
    // Where all that is scored would be a candidate, all heads score at once.
    reranked = config.candidates > 0 && config.candidates < columns;
    routed = config.router != Router::all && !routes_every_head(config, all) &&
             (config.candidates == 0 || reranked);
    linear = routed && config.residual;
    heads = routed ? config.heads : all;
    keep = reranked ? config.candidates : config.top_k;
    // Those kernels have bits of their own: whether they score must not hang on lengths.
    const bool takes = device.hopper && shape.q_dtype == DType::e4m3 &&
                       shape.k_dtype == DType::e4m3 && shape.dim == kDim;
    fp8 = takes && heads + linear <= kMaxRows;
    fused = fp8 && !filtered;
    rerank_fp8 = takes && reranked && all <= kMaxRows;
  }
};

// What fused scoring keeps: room for a plan's largest slab, and how the slab at hand is cut.
struct FusedMemory {
  fused::Layout layout{};
  std::span<float> samples;
  float* thresholds = nullptr;
  Candidates candidates{};
  std::span<std::uint32_t> counts;
  select::FallbackRows fallback{};
  // The candidates' memory once the survivors among them are chosen: what fallback scores there.
  std::span<float> fallback_scores;

  FusedMemory() = default;
  FusedMemory(const Needs& needs, const Shape& slab, std::int64_t total_keys, const Device& device,
              Bump& bump)
      : layout(layout_for(needs, slab, total_keys, device)) {
    const auto take_floats = [&](std::int64_t count) {
      return std::span(bump.take<float>(count), static_cast<std::size_t>(count));
    };
    samples = take_floats(slab.tokens * layout.samples);
    thresholds = bump.take<float>(slab.tokens);
    const std::int64_t lists = slab.tokens * layout.lists;
    fallback_scores = take_floats(std::max(lists * layout.capacity * kFloats, slab.max_keys));
    counts = {bump.take<std::uint32_t>(lists), static_cast<std::size_t>(lists)};
    fallback = {bump.take<std::int32_t>(slab.tokens), bump.take<std::uint32_t>(1),
                bump.take<std::uint32_t>(slab.tokens)};
  }

  // Cuts a slab of a call with `total_keys` keys: as suits it if there is room, else as was
  // planned.
  void cut(const Needs& needs, Shape slab, std::int64_t total_keys, const Device& device) {
    slab.max_keys = std::min(slab.max_keys, total_keys);
    const fused::Layout own = layout_for(needs, slab, total_keys, device);
    const std::int64_t lists = slab.tokens * own.lists;
    if (slab.tokens * own.samples <= std::ssize(samples) && lists <= std::ssize(counts) &&
        lists * own.capacity * kFloats <= std::ssize(fallback_scores)) {
      layout = own;
    }
    layout.samples = (total_keys + layout.sample_stride - 1) / layout.sample_stride;
    candidates = {reinterpret_cast<Candidate*>(fallback_scores.data()), counts.data(),
                  static_cast<std::uint32_t>(layout.lists), layout.capacity};
  }

 private:
  static constexpr std::int64_t kFloats = sizeof(Candidate) / sizeof(float);

  static fused::Layout layout_for(const Needs& needs, const Shape& slab, std::int64_t total_keys,
                                  const Device& device) {
    return fused::layout({slab.tokens, std::max<std::int64_t>(total_keys, 1), slab.max_keys,
                          needs.heads + needs.linear, needs.keep, device.num_sms});
  }
};

// The workspace of a slab.
struct Memory {
  Routing routing{};
  std::int32_t* blocks = nullptr;
  std::span<std::byte> route_means;
  std::span<std::byte> filter;
  std::span<std::byte> filter_means;
  float* scales = nullptr;  // of all keys of a call, as the kernels of src/fused want them
  FusedMemory fused;
  score::Rows rows{};
  score::Rows all_rows{};
  Scores scores{};
  std::int32_t* lengths = nullptr;
  std::int32_t* candidates = nullptr;
  Scores candidate_scores{};
  std::int32_t* candidate_lengths = nullptr;
  std::int32_t* chosen = nullptr;  // indices, where the caller wants none

  Memory(const IndexerConfig& config, const Shape& slab, std::int64_t total_keys,
         const Device& device, Bump& bump) {
    const Needs needs(config, slab, device);
    const std::int64_t queries = slab.tokens;
    const auto all = static_cast<std::int32_t>(slab.heads);
    if (config.router != Router::all) {
      routing.heads = bump.take<std::int32_t>(queries * config.heads);
      if (config.residual) {
        routing.residual = bump.take<float>(queries * slab.dim);
        routing.rounded = bump.take<std::uint8_t>(queries * slab.dim);
        routing.rounded_scale = bump.take<float>(queries);
      }
      route_means =
          bump.take_bytes(config.router == Router::pooled
                              ? pool::workspace_bytes(slab, total_keys, config.block, true)
                              : 0);
    }
    if (needs.filtered) {
      blocks = bump.take<std::int32_t>(queries * config.filter_blocks);
      filter = bump.take_bytes(filter::workspace_bytes(config, slab));
      filter_means =
          bump.take_bytes(pool::workspace_bytes(slab, total_keys, config.filter_block, false));
    }
    if (needs.fp8 || needs.rerank_fp8) {
      scales = bump.take<float>(score::scale_count(total_keys));
    }
    if (!needs.fp8) {
      rows = score::rows_for(slab, needs.heads, needs.linear);
      take_rows(rows, queries, bump);
    }
    if (needs.fused) {
      fused = FusedMemory(needs, slab, total_keys, device, bump);
    } else {
      scores = {bump.take<float>(queries * needs.columns), needs.columns};
      lengths = bump.take<std::int32_t>(queries);
    }
    chosen = bump.take<std::int32_t>(queries * config.top_k);
    if (needs.reranked) {
      if (!needs.rerank_fp8) {
        all_rows = score::rows_for(slab, all, false);
        take_rows(all_rows, queries, bump);
      }
      candidates = bump.take<std::int32_t>(queries * needs.keep);
      candidate_scores = {bump.take<float>(queries * needs.keep), needs.keep};
      candidate_lengths = bump.take<std::int32_t>(queries);
    }
  }

 private:
  static void take_rows(score::Rows& rows, std::int64_t queries, Bump& bump) {
    const std::int64_t count = queries * rows.padded();
    rows.data =
        bump.take<std::byte>(count * rows.dim * static_cast<std::int64_t>(size_of(rows.operand)));
    rows.weight = bump.take<float>(count);
  }
};

std::size_t bytes_for(const IndexerConfig& config, const Shape& slab, std::int64_t total_keys,
                      const Device& device) {
  Bump bump(nullptr);
  const Memory counted(config, slab, total_keys, device, bump);
  return bump.used();
}

Shape with_tokens(Shape shape, std::int64_t tokens) {
  shape.tokens = tokens;
  return shape;
}

// Queries first … first + count - 1 of a problem.
Problem slab_of(Problem problem, std::int64_t first, std::int64_t count) {
  problem.q.data =
      static_cast<const std::byte*>(problem.q.data) +
      first * problem.q.token_stride * static_cast<std::int64_t>(size_of(problem.q.dtype));
  problem.w.data += first * problem.w.token_stride;
  problem.k.starts += first;
  problem.k.ends += first;
  problem.q.tokens = problem.w.tokens = count;
  return problem;
}

// Row `first` of an output; null if it is not wanted.
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

// One slab: the stages in order.
class Slab {
 public:
  // `empty`: rows of queries that see nothing are written, else they are left as they are.
  Slab(const IndexerConfig& config, const Needs& needs, const Problem& problem, Memory memory,
       const Device& device, bool empty, Stages& stages, cudaStream_t stream)
      : config_(config),
        needs_(needs),
        problem_(problem),
        memory_(memory),
        device_(device),
        empty_(empty),
        stages_(stages),
        stream_(stream) {}

  // Outputs of the slab's first query on; null where not wanted.
  void run(TopK out, std::int32_t* heads, float* residual) {
    out.indices = out.indices != nullptr ? out.indices : memory_.chosen;
    memory_.routing.heads = heads != nullptr ? heads : memory_.routing.heads;
    memory_.routing.residual = residual != nullptr ? residual : memory_.routing.residual;
    const bool reported = heads != nullptr || residual != nullptr;
    if (needs_.routed || (config_.router != Router::all && reported)) {
      stages_.enter("route");
      route();
    }
    Columns columns{nullptr, 0, 1};
    if (needs_.filtered) {
      stages_.enter("filter");
      const BlockMeans means =
          pool::launch(problem_, config_.filter_block, false, memory_.filter_means, stream_);
      filter::launch(problem_, config_, device_, means, memory_.blocks, memory_.filter, stream_);
      columns = {memory_.blocks, config_.filter_blocks, config_.filter_block};
    }
    // A row that is selected whole is scored only to report its scores.
    const std::int32_t whole = out.scores == nullptr ? config_.top_k : 0;
    const TopK first = needs_.reranked ? TopK{memory_.candidates, nullptr} : out;
    const score::ScoredRows rows{needs_.routed ? memory_.routing.heads : nullptr, needs_.heads,
                                 needs_.linear ? memory_.routing.rounded : nullptr,
                                 memory_.routing.rounded_scale};
    if (needs_.fused) {
      fused(rows, first);
    } else {
      stages_.enter("score");
      rerank::launch_lengths(problem_.k, problem_.q.tokens, columns, kAll, memory_.lengths,
                             stream_);
      const std::int32_t unscored = needs_.reranked ? needs_.keep : whole;
      if (needs_.fp8) {
        score::launch_gathered(problem_, rows, columns, memory_.lengths, unscored, memory_.scales,
                               memory_.scores, device_.num_sms, stream_);
      } else {
        score(needs_.routed ? &memory_.routing : nullptr, memory_.rows, columns, unscored,
              memory_.scores);
      }
      select(columns, memory_.scores, memory_.lengths, needs_.keep, first);
    }
    if (!needs_.reranked) {
      return;
    }
    stages_.enter("rerank");
    const Columns kept{memory_.candidates, needs_.keep, 1};
    rerank::launch_lengths(problem_.k, problem_.q.tokens, columns, needs_.keep,
                           memory_.candidate_lengths, stream_);
    if (needs_.rerank_fp8) {
      score::launch_gathered(problem_,
                             {nullptr, static_cast<int>(problem_.q.heads), nullptr, nullptr}, kept,
                             memory_.candidate_lengths, whole, memory_.scales,
                             memory_.candidate_scores, device_.num_sms, stream_);
    } else {
      score(nullptr, memory_.all_rows, kept, whole, memory_.candidate_scores);
    }
    select(kept, memory_.candidate_scores, memory_.candidate_lengths, config_.top_k, out);
  }

 private:
  // Step 1, from block means where the router looks at them.
  void route() const {
    if (config_.router != Router::pooled) {
      route::launch(problem_, config_, device_, nullptr, memory_.routing, stream_);
      return;
    }
    const BlockMeans means =
        pool::launch(problem_, config_.block, true, memory_.route_means, stream_);
    route::launch(problem_, config_, device_, &means, memory_.routing, stream_);
  }

  // Steps 3 and 4: a threshold from sampled scores, the scores above it, the best of them; then,
  // from all their scores, the rows whose threshold misled.
  void fused(const score::ScoredRows& rows, const TopK& out) const {
    const FusedMemory& memory = memory_.fused;
    const Keys& keys = problem_.k;
    const std::int64_t queries = problem_.q.tokens;
    const fused::Layout& layout = memory.layout;
    stages_.enter("samples");
    fused::launch_samples(problem_, rows, layout, memory_.scales, memory.samples.data(), stream_);
    stages_.enter("threshold");
    select::launch_threshold({memory.samples.data(), layout.samples, layout.samples}, keys, queries,
                             needs_.keep, memory.thresholds, memory.fallback, stream_);
    stages_.enter("candidates");
    fused::launch_candidates(problem_, rows, layout, memory_.scales, memory.thresholds,
                             memory.candidates, stream_);
    stages_.enter("survivors");
    select::launch_survivors(memory.candidates, keys, queries, needs_.keep, out, empty_,
                             memory.fallback, stream_);
    stages_.enter("fallback");
    fused::launch_fallback(problem_, rows, memory_.scales, memory.fallback, needs_.keep, out,
                           memory.fallback_scores, device_.num_sms, stream_);
  }

  void score(const Routing* routing, const score::Rows& rows, const Columns& columns,
             std::int32_t unscored, const Scores& scores) const {
    score::launch_rows(problem_, routing, rows, stream_);
    score::launch_generic(problem_, rows, columns, unscored, scores, stream_);
  }

  void select(const Columns& columns, const Scores& scores, const std::int32_t* lengths,
              std::int32_t count, const TopK& out) const {
    stages_.enter("select");
    const Logits logits{scores.data, problem_.q.tokens, scores.columns, scores.columns, lengths};
    if (scores.columns <= select::kShortColumns) {
      select::launch_short(logits, problem_.k, columns, count, out, empty_, stream_);
      return;
    }
    select::launch_generic(logits, count, out, empty_, stream_);
    if (columns.list != nullptr) {
      rerank::launch_positions(problem_.k, problem_.q.tokens, columns, out.indices, count, stream_);
    }
  }

  const IndexerConfig& config_;
  Needs needs_;
  Problem problem_;
  Memory memory_;
  const Device& device_;
  bool empty_;
  Stages& stages_;
  cudaStream_t stream_;
};

}  // namespace

std::vector<Step::Pass> Step::passes(const IndexerConfig& config, const Shape& shape) {
  constexpr std::int32_t kMost = std::numeric_limits<std::int32_t>::max();
  const std::int64_t dense = config.dense_work / shape.heads;
  std::vector<Pass> passes;
  if (dense == 0 || dense < shape.max_keys) {
    IndexerConfig own = effective_config(config, shape.heads);
    if (routes_every_head(config, shape.heads)) {
      own.router = Router::weight;  // the cheapest one that reports which heads are active
      own.heads = config.heads;
    }
    passes.push_back({own, static_cast<std::int32_t>(dense > 0 ? dense + 1 : 0), kMost, shape});
  }
  if (dense > 0) {
    IndexerConfig all = IndexerConfig::dsa(config.top_k);
    all.ordered = config.ordered;
    passes.push_back(
        {all, 0, static_cast<std::int32_t>(std::min<std::int64_t>(dense, kMost)), shape});
  }
  return passes;
}

std::size_t Step::least_bytes(const IndexerConfig& config, const Shape& shape,
                              std::int64_t total_keys, const Device& device) {
  std::size_t bytes = 0;
  for (const Pass& pass : passes(config, shape)) {
    bytes = std::max(bytes, bytes_for(pass.config, with_tokens(shape, 1), total_keys, device));
  }
  return bytes;
}

Step::Step(const IndexerConfig& config, const Shape& shape, std::int64_t total_keys,
           std::size_t workspace_cap, const Device& device)
    : passes_(passes(config, shape)), total_keys_(total_keys), device_(device) {
  for (const Pass& pass : passes_) {
    const Needs needs(pass.config, shape, device);
    for (const int wanted : {pass.config.top_k, needs.keep}) {
      if (wanted > kMaxTopK) {
        throw Error(ErrorCode::unsupported,
                    fmt::format("top_k, candidates: expected at most {} on a CUDA backend, got {}",
                                kMaxTopK, wanted));
      }
    }
    if ((needs.fp8 || needs.rerank_fp8) && total_keys > fused::kMaxKeys) {
      throw Error(ErrorCode::unsupported,
                  fmt::format("total_keys: expected at most {} of e4m3 on this backend, got {}",
                              fused::kMaxKeys, total_keys));
    }
  }
  const std::size_t least = least_bytes(config, shape, total_keys, device);
  if (least > workspace_cap) {
    throw Error(ErrorCode::workspace,
                fmt::format("workspace cap: expected at least {} bytes for this shape, got {}",
                            least, workspace_cap));
  }
  for (Pass& pass : passes_) {
    std::int64_t fits = 1;
    std::int64_t too_many = std::clamp<std::int64_t>(shape.tokens, 1, kMaxSlab) + 1;
    while (too_many - fits > 1) {
      const std::int64_t middle = std::midpoint(fits, too_many);
      const bool fit =
          bytes_for(pass.config, with_tokens(shape, middle), total_keys, device) <= workspace_cap;
      (fit ? fits : too_many) = middle;
    }
    pass.slab.tokens = fits;
  }
}

std::size_t Step::workspace_bytes() const {
  std::size_t bytes = 0;
  for (const Pass& pass : passes_) {
    bytes = std::max(bytes, bytes_for(pass.config, pass.slab, total_keys_, device_));
  }
  return bytes;
}

void Step::run(const Problem& problem, const Selection& out, std::byte* workspace,
               void* stream) const {
  const auto on = static_cast<cudaStream_t>(stream);
  Stages stages;
  // What a routed pass writes for queries that are not its own. Where there is none, none are.
  const IndexerConfig& routed = passes_.front().config;
  if (routed.router == Router::all) {
    fill(out.heads, 0xFF, on);
  }
  if (!routed.residual) {
    fill(out.residual, 0, on);
  }
  for (const Pass& pass : passes_) {
    const Needs needs(pass.config, pass.slab, device_);
    Bump bump(workspace);
    Memory memory(pass.config, pass.slab, total_keys_, device_, bump);
    Problem own = problem;
    own.k.least_keys = pass.least;
    own.k.most_keys = pass.most;
    if (needs.fp8 || needs.rerank_fp8) {
      stages.enter("scales");
      score::launch_scales(own.k, memory.scales, on);
    }
    const bool first_pass = &pass == &passes_.front();
    for (std::int64_t first = 0; first < own.q.tokens; first += pass.slab.tokens) {
      const std::int64_t count = std::min(pass.slab.tokens, own.q.tokens - first);
      Memory fitted = memory;
      if (needs.fused) {
        fitted.fused.cut(needs, with_tokens(pass.slab, count), own.k.tokens, device_);
      }
      Slab(pass.config, needs, slab_of(own, first, count), fitted, device_, first_pass, stages, on)
          .run({row_of(out.indices, first, pass.config.top_k),
                row_of(out.scores, first, pass.config.top_k)},
               row_of(out.heads, first, pass.config.heads),
               pass.config.residual ? row_of(out.residual, first, own.q.dim) : nullptr);
    }
  }
}

}  // namespace misa::cuda
