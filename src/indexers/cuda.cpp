// The indexers on a CUDA device. Queries are taken in slabs whose scores fit the workspace:
//
//  1. route   active heads and the residual row
//  2. filter  the blocks that are kept
//  3. score   [slab, columns]: columns are positions, or those of the kept blocks
//  4. select  the top k of each row; or the top m, whose scores over all heads are then
//  5. rerank  [slab, m], of which the top k are selected
//
// How queries are cut into slabs never changes a result.
#include "indexers/cuda.hpp"

#include <fmt/format.h>
#include <nvtx3/nvToolsExt.h>

#include <algorithm>
#include <limits>
#include <numeric>

#include "misa/cuda.hpp"
#include "misa/error.hpp"
#include "rerank/generic.hpp"
#include "route/generic.hpp"
#include "score/generic.hpp"
#include "select/generic.hpp"

namespace misa::cuda {
namespace {

// More queries at once only add memory: these are 128 groups of 32 for each tile of keys.
constexpr std::int64_t kMaxSlab = 4096;

// A stage's name in a profile.
class Stage {
 public:
  explicit Stage(const char* name) { nvtxRangePushA(name); }
  ~Stage() { nvtxRangePop(); }
  Stage(const Stage&) = delete;
  Stage& operator=(const Stage&) = delete;
};

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
  std::int64_t columns;  // of the first scores
  std::int32_t keep;     // of them

  Needs(const IndexerConfig& config, const Shape& shape) {
    const auto blocks = [&](std::int64_t size) { return (shape.max_keys + size - 1) / size; };
    filtered = config.filter_block > 0 && blocks(config.filter_block) > config.filter_blocks;
    columns = filtered ? std::int64_t{config.filter_block} * config.filter_blocks : shape.max_keys;
    // Where all that is scored would be a candidate, all heads score at once.
    reranked = config.candidates > 0 && config.candidates < columns;
    routed = config.router != Router::all && (config.candidates == 0 || reranked);
    keep = reranked ? config.candidates : config.top_k;
  }
};

// The workspace of a slab.
struct Memory {
  Routing routing{};
  std::int32_t* blocks = nullptr;
  std::span<std::byte> route;
  std::span<std::byte> filter;
  score::Rows rows{};
  score::Rows all_rows{};
  Scores scores{};
  std::int32_t* lengths = nullptr;
  std::int32_t* candidates = nullptr;
  Scores candidate_scores{};
  std::int32_t* candidate_lengths = nullptr;
  std::int32_t* chosen = nullptr;  // indices, where the caller wants none

  Memory(const IndexerConfig& config, const Shape& slab, std::int64_t total_keys, Bump& bump) {
    const Needs needs(config, slab);
    const std::int64_t queries = slab.tokens;
    const auto all = static_cast<std::int32_t>(slab.heads);
    if (config.router != Router::all) {
      routing.heads = bump.take<std::int32_t>(queries * config.heads);
      if (config.residual) {
        routing.residual = bump.take<float>(queries * slab.dim);
        routing.rounded = bump.take<std::uint8_t>(queries * slab.dim);
        routing.rounded_scale = bump.take<float>(queries);
      }
      route = bump.take_bytes(route::workspace_bytes(config, slab, total_keys));
    }
    if (needs.filtered) {
      blocks = bump.take<std::int32_t>(queries * config.filter_blocks);
      filter = bump.take_bytes(filter::workspace_bytes(config, slab, total_keys));
    }
    // With every head routed there is nothing left for a residual row to stand for.
    rows = needs.routed ? score::rows_for(slab, config.heads, config.residual && config.heads < all)
                        : score::rows_for(slab, all, false);
    take_rows(rows, queries, bump);
    scores = {bump.take<float>(queries * needs.columns), needs.columns};
    lengths = bump.take<std::int32_t>(queries);
    chosen = bump.take<std::int32_t>(queries * config.top_k);
    if (needs.reranked) {
      all_rows = score::rows_for(slab, all, false);
      take_rows(all_rows, queries, bump);
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

std::size_t bytes_for(const IndexerConfig& config, const Shape& slab, std::int64_t total_keys) {
  Bump bump(nullptr);
  const Memory counted(config, slab, total_keys, bump);
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

// One slab: the stages in order.
class Slab {
 public:
  Slab(const IndexerConfig& config, const Shape& shape, const Problem& problem, Memory memory,
       cudaStream_t stream)
      : config_(config),
        needs_(config, shape),
        problem_(problem),
        memory_(memory),
        stream_(stream) {}

  // Outputs of the slab's first query on; null where not wanted.
  void run(TopK out, std::int32_t* heads, float* residual) {
    out.indices = out.indices != nullptr ? out.indices : memory_.chosen;
    memory_.routing.heads = heads != nullptr ? heads : memory_.routing.heads;
    memory_.routing.residual = residual != nullptr ? residual : memory_.routing.residual;
    if (needs_.routed || heads != nullptr || residual != nullptr) {
      const Stage stage("route");
      route::launch(problem_, config_, memory_.routing, memory_.route, stream_);
    }
    Columns columns{nullptr, 0, 1};
    if (needs_.filtered) {
      const Stage stage("filter");
      filter::launch(problem_, config_, memory_.blocks, memory_.filter, stream_);
      columns = {memory_.blocks, config_.filter_blocks, config_.filter_block};
    }
    // A row that is selected whole is scored only to report its scores.
    const std::int32_t whole = out.scores == nullptr ? config_.top_k : 0;
    const Routing* routing = needs_.routed ? &memory_.routing : nullptr;
    if (!needs_.reranked) {
      score(routing, memory_.rows, columns, whole, memory_.scores);
      select(columns, memory_.scores, memory_.lengths, config_.top_k, out);
      return;
    }
    score(routing, memory_.rows, columns, needs_.keep, memory_.scores);
    select(columns, memory_.scores, memory_.lengths, needs_.keep, {memory_.candidates, nullptr});
    const Columns kept{memory_.candidates, needs_.keep, 1};
    score(nullptr, memory_.all_rows, kept, whole, memory_.candidate_scores);
    rerank::launch_lengths(problem_.k, problem_.q.tokens, columns, needs_.keep,
                           memory_.candidate_lengths, stream_);
    select_columns(kept, memory_.candidate_scores, memory_.candidate_lengths, config_.top_k, out);
  }

 private:
  void score(const Routing* routing, const score::Rows& rows, const Columns& columns,
             std::int32_t unscored, const Scores& scores) const {
    const Stage stage("score");
    score::launch_rows(problem_, routing, rows, stream_);
    score::launch_generic(problem_, rows, columns, unscored, scores, stream_);
  }

  void select(const Columns& columns, const Scores& scores, std::int32_t* lengths,
              std::int32_t count, const TopK& out) const {
    constexpr std::int32_t kAll = std::numeric_limits<std::int32_t>::max();
    rerank::launch_lengths(problem_.k, problem_.q.tokens, columns, kAll, lengths, stream_);
    select_columns(columns, scores, lengths, count, out);
  }

  void select_columns(const Columns& columns, const Scores& scores, const std::int32_t* lengths,
                      std::int32_t count, const TopK& out) const {
    const Stage stage("select");
    const Logits logits{scores.data, problem_.q.tokens, scores.columns, scores.columns, lengths};
    select::launch_generic(logits, count, out, stream_);
    if (columns.list != nullptr) {
      rerank::launch_positions(problem_.k, problem_.q.tokens, columns, out.indices, count, stream_);
    }
  }

  const IndexerConfig& config_;
  Needs needs_;
  Problem problem_;
  Memory memory_;
  cudaStream_t stream_;
};

}  // namespace

std::size_t Step::least_bytes(const IndexerConfig& config, const Shape& shape,
                              std::int64_t total_keys) {
  return bytes_for(config, with_tokens(shape, 1), total_keys);
}

Step::Step(const IndexerConfig& config, const Shape& shape, std::int64_t total_keys,
           std::size_t workspace_cap)
    : config_(config), slab_(shape), total_keys_(total_keys) {
  const Needs needs(config, shape);
  for (const int wanted : {config.top_k, needs.keep}) {
    if (wanted > kMaxTopK) {
      throw Error(ErrorCode::unsupported,
                  fmt::format("top_k, candidates: expected at most {} on a CUDA backend, got {}",
                              kMaxTopK, wanted));
    }
  }
  const auto bytes = [&](std::int64_t rows) {
    return bytes_for(config_, with_tokens(shape, rows), total_keys);
  };
  if (bytes(1) > workspace_cap) {
    throw Error(ErrorCode::workspace,
                fmt::format("workspace cap: expected at least {} bytes for this shape, got {}",
                            bytes(1), workspace_cap));
  }
  std::int64_t fits = 1;
  std::int64_t too_many = std::clamp<std::int64_t>(shape.tokens, 1, kMaxSlab) + 1;
  while (too_many - fits > 1) {
    const std::int64_t middle = std::midpoint(fits, too_many);
    (bytes(middle) <= workspace_cap ? fits : too_many) = middle;
  }
  slab_.tokens = fits;
}

std::size_t Step::workspace_bytes() const { return bytes_for(config_, slab_, total_keys_); }

void Step::run(const Problem& problem, const Selection& out, std::byte* workspace,
               void* stream) const {
  Bump bump(workspace);
  const Memory memory(config_, slab_, total_keys_, bump);
  for (std::int64_t first = 0; first < problem.q.tokens; first += slab_.tokens) {
    const std::int64_t count = std::min(slab_.tokens, problem.q.tokens - first);
    Slab(config_, slab_, slab_of(problem, first, count), memory, static_cast<cudaStream_t>(stream))
        .run({row_of(out.indices, first, config_.top_k), row_of(out.scores, first, config_.top_k)},
             row_of(out.heads, first, config_.heads), row_of(out.residual, first, problem.q.dim));
  }
}

}  // namespace misa::cuda
