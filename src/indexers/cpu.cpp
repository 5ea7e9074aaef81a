// SPDX-License-Identifier: Apache-2.0
// The indexers on the CPU. Queries are taken in waves that fit the workspace; in a wave each stage
// is one parallel loop:
//
//  1. pool    sums of whole pages, then tiles of block means, for every sequence of the wave
//  2. route   a query: active heads, residual row, kept blocks -> the rows that score for it
//  3. score   a block of queries x a part of the pages: each page is packed once, scored by every
//             query that sees it and offered to that query's selector
//  4. finish  a query: merge its parts' selectors, re-rank, write
//
// How queries are cut into waves, blocks and parts never changes a result: every dot product and
// every sum over keys has an order of its own, and selection is exact.
#include <fmt/format.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <limits>
#include <memory>
#include <numeric>
#include <vector>

#include "core/recipe.hpp"
#include "cpu/load.hpp"
#include "filter/cpu.hpp"
#include "indexers/backend.hpp"
#include "misa/error.hpp"
#include "pool/cpu.hpp"
#include "rerank/cpu.hpp"
#include "route/cpu.hpp"
#include "select/cpu.hpp"

namespace misa::cpu {
namespace {

// Queries that share a packed page. Packing costs about as much as scoring one query by 8 heads,
// so 64 make it a few percent; their rows (8 heads x 128 x 2 bytes each) stay in the L2 cache.
constexpr std::int64_t kQueryBlock = 64;

// More queries in one wave only add memory: a wave already feeds every thread several blocks.
constexpr std::int64_t kMaxWave = 1024;

// Page sums of one wave may take this much, or what one sequence needs if that is more.
constexpr std::int64_t kPoolBytes = std::int64_t{32} << 20;

constexpr float kNoFloor = -std::numeric_limits<float>::infinity();

constexpr std::int64_t ceil_div(std::int64_t a, std::int64_t b) { return (a + b - 1) / b; }

// Hands out pieces of one buffer, or counts what they would take.
class Bump {
 public:
  explicit Bump(std::byte* base) : base_(base) {}

  template <class T>
  T* take(std::int64_t count) {
    constexpr std::size_t kAlign = 64;
    static_assert(alignof(T) <= kAlign);
    const std::size_t at = used_;
    used_ += ceil_div(static_cast<std::int64_t>(sizeof(T)) * count, kAlign) * kAlign;
    return base_ == nullptr ? nullptr : reinterpret_cast<T*>(base_ + at);
  }

  [[nodiscard]] std::byte* take_bytes(std::int64_t count) { return take<std::byte>(count); }
  [[nodiscard]] std::size_t used() const { return used_; }
  [[nodiscard]] bool counting() const { return base_ == nullptr; }

 private:
  std::byte* base_;
  std::size_t used_ = 0;
};

// What a plan needs, from shapes alone.
struct Needs {
  std::int64_t heads;
  std::int64_t dim;
  std::int64_t threads;
  Operand operand;
  bool pooled;   // the router looks at block means
  bool sampled;  // routing or the residual looks at sampled keys
  bool filtered;
  bool reranked;
  std::int64_t rows;        // most rows that score for a query
  std::int64_t keep;        // what the first selection keeps
  std::int64_t capacity;    // entries of a first selector
  std::int64_t final_keep;  // and of the selection that follows a re-rank
  std::int64_t final_capacity;
  std::int64_t queries;  // of a wave
  std::int64_t slots;    // selectors of a wave, shared out as parts
  std::int64_t pages;    // page sums of a wave
  std::int64_t pooled_tiles;
  std::int64_t filter_tiles;
  std::int64_t filter_words;  // 64 blocks each
  std::int64_t ranking;       // most values that top_indices ranks

  Needs(const IndexerConfig& config, const Shape& shape, const Kernels& kernels,
        std::int64_t thread_count, std::int64_t wave);
};

std::int64_t selector_capacity(std::int64_t keep, std::int64_t max_keys) {
  // Twice what is kept: a compaction of 2k entries is paid for by k appends.
  return std::min(2 * keep, std::max(keep, max_keys)) + 2 * kSelectorSlack;
}

Needs::Needs(const IndexerConfig& config, const Shape& shape, const Kernels& kernels,
             std::int64_t thread_count, std::int64_t wave)
    : heads(shape.heads), dim(shape.dim), threads(thread_count) {
  operand = kernels.native_bf16 && shape.q_dtype != DType::f32 && shape.k_dtype != DType::f32
                ? Operand::bf16
                : Operand::f32;
  const bool routed = config.router != Router::all;
  pooled = config.router == Router::pooled;
  sampled = routed && (config.residual || config.router == Router::nonlinearity ||
                       config.router == Router::dispersion);
  filtered = config.filter_block > 0;
  reranked = config.candidates > 0;
  rows = routed ? config.heads + (config.residual ? kMaxResidualRows : 0) : shape.heads;
  // All heads score where all are candidates, and in rows that take every head.
  rows = std::max(rows, reranked || config.dense_work > 0 ? shape.heads : 0);
  const std::int64_t max_keys = std::max<std::int64_t>(1, shape.max_keys);
  keep = std::min<std::int64_t>(reranked ? config.candidates : config.top_k, max_keys);
  capacity = selector_capacity(keep, max_keys);
  final_keep = std::min<std::int64_t>(config.top_k, max_keys);
  final_capacity = selector_capacity(final_keep, max_keys);
  queries = wave;
  slots = std::max(queries, 2 * threads);

  const std::int64_t own_pages = pooled || filtered ? max_keys / kPageSize : 0;
  const std::int64_t bytes = dim * static_cast<std::int64_t>(sizeof(float));
  pages = std::max(own_pages, std::min(kPoolBytes / bytes, own_pages * wave));
  // A tile of means a sequence at least, and one more for every 64 whole blocks.
  const auto tiles = [&](std::int64_t block) {
    return ceil_div(max_keys / block, kPageSize) + pages * kPageSize / block / kPageSize + wave;
  };
  pooled_tiles = pooled ? tiles(config.block) : 0;
  filter_tiles = filtered ? tiles(config.filter_block) : 0;
  const std::int64_t blocks = filtered ? ceil_div(max_keys, config.filter_block) : 0;
  filter_words = ceil_div(blocks, 64);
  ranking = std::max(heads, blocks);
}

// What one thread computes in.
struct Thread {
  Tile tile;
  Tile sample[2];
  Tile single;  // the last key, or a partial block's mean (f32)
  Tile partial_filter;
  std::byte* pack;  // 64 rows of operands
  float* means;     // 64 rows of f32
  std::byte* rows;  // all heads, operands
  float* rows_f32;  // all heads
  float* dots;      // [H][128]
  float* weight;    // [H]
  float* floor;     // [H] zeros
  float* values;    // [H]
  HeadFit fit;
  float* sample_squares;  // [128]
  float* residual;        // [D]
  float* block_scores;
  std::int32_t* indices;  // [ranking]
  std::uint64_t* ranking;
  std::uint64_t* select;  // scratch of selection
  std::uint64_t* final_entries;
  std::int64_t sample_stride;  // of the tiles in `sample`, 0: none
  std::int64_t sample_count;
};

struct SequenceState {
  Sequence queries;
  std::int64_t n;  // what its longest query sees of those that do not take every head
  PageSums sums;
  float* own_sums;  // null where the cache's sidecar serves
  std::span<Tile> pooled;
  std::span<Tile> filter;
};

struct QueryState {
  std::int64_t n;
  bool scored;    // stage 3 has work to do; otherwise every position is selected
  bool filtered;  // only the kept blocks are scored
  bool reranked;  // otherwise stage 3 is the only selection
  QueryRows rows;
  std::byte* row_data;
  float* weight;
  float* floor;
  std::uint64_t* kept;  // a bit a block
  Selector* selectors;  // one a part
};

struct QueryBlock {
  std::int64_t sequence;
  std::int64_t first;
  std::int64_t count;
};

struct Workspace {
  std::span<Thread> threads;
  std::span<SequenceState> sequences;
  std::span<QueryState> queries;
  std::span<QueryBlock> blocks;
  std::span<Selector> selectors;
  float* page_sums;
  std::span<Tile> pooled;
  std::span<Tile> filter;

  Workspace(const Needs& needs, Bump& bump);
};

Workspace::Workspace(const Needs& needs, Bump& bump) {
  const std::int64_t dim = needs.dim;
  const std::int64_t heads = needs.heads;
  const auto element = static_cast<std::int64_t>(size_of(needs.operand));
  const auto list = [&]<class T>(std::span<T>& span, std::int64_t count) {
    T* data = bump.take<T>(count);
    if (!bump.counting()) {
      std::uninitialized_value_construct_n(data, count);
      span = {data, static_cast<std::size_t>(count)};
    }
  };
  const auto for_each = [&](auto& span, std::int64_t count, auto body) {
    using T = typename std::remove_reference_t<decltype(span)>::value_type;
    list(span, count);
    T counted{};
    for (std::int64_t i = 0; i < count; ++i) {
      body(bump.counting() ? counted : span[i]);
    }
  };
  const auto tile = [&](Tile& it, Operand operand) {
    it.data = bump.take_bytes(static_cast<std::int64_t>(size_of(operand)) * kPageSize * dim);
  };

  for_each(threads, needs.threads, [&](Thread& it) {
    tile(it.tile, needs.operand);
    tile(it.single, Operand::f32);
    if (needs.sampled) {
      tile(it.sample[0], needs.operand);
      tile(it.sample[1], needs.operand);
      it.sample_squares = bump.take<float>(kMaxSamples);
    }
    if (needs.filtered) {
      tile(it.partial_filter, Operand::f32);
      it.block_scores = bump.take<float>(needs.ranking);
    }
    it.pack = bump.take_bytes(kPageSize * dim * element);
    it.means = bump.take<float>(kPageSize * dim);
    it.rows = bump.take_bytes(heads * dim * element);
    it.rows_f32 = bump.take<float>(heads * dim);
    it.dots = bump.take<float>(heads * kMaxSamples);
    it.weight = bump.take<float>(heads);
    it.floor = bump.take<float>(heads);
    it.values = bump.take<float>(heads);
    it.fit = {bump.take<float>(heads), bump.take<float>(heads), bump.take<float>(heads)};
    it.residual = bump.take<float>(dim);
    it.indices = bump.take<std::int32_t>(needs.ranking);
    it.ranking = bump.take<std::uint64_t>(needs.ranking);
    it.select = bump.take<std::uint64_t>(std::max(needs.capacity, needs.final_capacity));
    it.final_entries = bump.take<std::uint64_t>(needs.reranked ? needs.final_capacity : 0);
    if (!bump.counting()) {
      std::fill_n(it.floor, heads, 0.0F);
    }
  });
  list(sequences, needs.queries);
  list(blocks, needs.queries);
  for_each(queries, needs.queries, [&](QueryState& it) {
    it.row_data = bump.take_bytes(needs.rows * dim * element);
    it.weight = bump.take<float>(needs.rows);
    it.floor = bump.take<float>(needs.rows);
    it.kept = bump.take<std::uint64_t>(needs.filter_words);
  });
  for_each(selectors, needs.slots,
           [&](Selector& it) { it.entries = bump.take<std::uint64_t>(needs.capacity); });
  page_sums = bump.take<float>(needs.pages * dim);
  for_each(pooled, needs.pooled_tiles, [&](Tile& it) { tile(it, Operand::f32); });
  for_each(filter, needs.filter_tiles, [&](Tile& it) { tile(it, Operand::f32); });
}

std::size_t bytes_for(const Needs& needs) {
  Bump bump(nullptr);
  const Workspace counted(needs, bump);
  return bump.used();
}

// What the largest wave needs whose workspace stays under the cap.
Needs largest_wave(const IndexerConfig& config, const Shape& shape, const Kernels& kernels,
                   const Context::State& context) {
  const auto needs = [&](std::int64_t wave) {
    return Needs(config, shape, kernels, context.threads.count(), wave);
  };
  const std::size_t least = bytes_for(needs(1));
  if (least > context.workspace_cap) {
    throw Error(ErrorCode::workspace,
                fmt::format("workspace cap: expected at least {} bytes for this shape, got {}",
                            least, context.workspace_cap));
  }
  std::int64_t fits = 1;
  std::int64_t too_many = std::clamp<std::int64_t>(shape.tokens, 1, kMaxWave) + 1;
  while (too_many - fits > 1) {
    const std::int64_t middle = std::midpoint(fits, too_many);
    (bytes_for(needs(middle)) <= context.workspace_cap ? fits : too_many) = middle;
  }
  return needs(fits);
}

class Run {
 public:
  Run(const Kernels& kernels, const Problem& problem, const Needs& needs, const Threads& threads,
      std::span<std::byte> memory)
      : kernels_(kernels),
        problem_(problem),
        config_(problem.config),
        needs_(needs),
        threads_(threads),
        bump_(memory.data()),
        workspace_(needs, bump_) {}

  void run() {
    for (std::int64_t t = 0; t < problem_.q.tokens;) {
      const std::int64_t next = begin_wave(t);
      pool();
      route();
      score();
      threads_.for_each(next - t, [&](std::int64_t i, int thread) {
        finish(wave_first_ + i, workspace_.threads[thread]);
      });
      t = next;
    }
  }

 private:
  // Takes the sequences from query t on that fit the workspace; returns the query after them.
  std::int64_t begin_wave(std::int64_t t) {
    wave_first_ = t;
    sequence_count_ = 0;
    std::int64_t pages = 0;
    std::int64_t pooled = 0;
    std::int64_t filter = 0;
    const std::int64_t limit = std::min(problem_.q.tokens, t + needs_.queries);
    while (t < limit) {
      SequenceState sequence{};
      sequence.queries = problem_.sequence_at(t, limit);
      for (std::int64_t i = 0; i < sequence.queries.queries; ++i) {
        const std::int64_t n = problem_.visible(t + i);
        sequence.n = std::max(sequence.n, config_.takes_every_head(needs_.heads, n) ? 0 : n);
      }
      const auto tiles = [&](bool wanted, std::int64_t block) {
        return wanted ? ceil_div(sequence.n / block, kPageSize) : 0;
      };
      const std::int64_t own_pages = needs_.pooled || needs_.filtered ? sequence.n / kPageSize : 0;
      const std::int64_t pooled_tiles = tiles(needs_.pooled, config_.block);
      const std::int64_t filter_tiles = tiles(needs_.filtered, config_.filter_block);
      if (sequence_count_ > 0 &&
          (pages + own_pages > needs_.pages || pooled + pooled_tiles > needs_.pooled_tiles ||
           filter + filter_tiles > needs_.filter_tiles)) {
        break;
      }
      const auto* paged = std::get_if<PagedKeys>(&problem_.keys);
      if (paged != nullptr && paged->cache.page_sums != nullptr) {
        sequence.sums.sidecar = paged->cache.page_sums;
      } else {
        sequence.own_sums = workspace_.page_sums + pages * needs_.dim;
        sequence.sums.own = sequence.own_sums;
      }
      sequence.pooled = workspace_.pooled.subspan(pooled, pooled_tiles);
      sequence.filter = workspace_.filter.subspan(filter, filter_tiles);
      workspace_.sequences[sequence_count_++] = sequence;
      pages += own_pages;
      pooled += pooled_tiles;
      filter += filter_tiles;
      t += sequence.queries.queries;
    }
    const std::int64_t queries = t - wave_first_;
    const std::int64_t threads = needs_.threads;
    // NOLINTNEXTLINE(clang-analyzer-core.DivideZero): a wave takes one query at least
    parts_ = std::clamp<std::int64_t>(needs_.slots / queries, 1, threads);
    const std::int64_t block =
        std::clamp<std::int64_t>(ceil_div(queries, 2 * threads), 1, kQueryBlock);
    block_count_ = 0;
    for (std::int64_t s = 0; s < sequence_count_; ++s) {
      const Sequence& in = workspace_.sequences[s].queries;
      for (std::int64_t i = 0; i < in.queries; i += block) {
        workspace_.blocks[block_count_++] = {s, in.first + i, std::min(block, in.queries - i)};
      }
    }
    return t;
  }

  QueryState& query(std::int64_t t) { return workspace_.queries[t - wave_first_]; }

  // Stage 1.
  void pool() {
    if (!needs_.pooled && !needs_.filtered) {
      return;
    }
    for (std::int64_t s = 0; s < sequence_count_; ++s) {
      const SequenceState& in = workspace_.sequences[s];
      if (in.own_sums != nullptr) {
        threads_.for_each(in.n / kPageSize, [&](std::int64_t page, int) {
          sum_page(kernels_, problem_, in.queries.first, page, kPageSize,
                   in.own_sums + page * needs_.dim);
        });
      }
      pool_tiles(in, in.pooled, config_.block);
      pool_tiles(in, in.filter, config_.filter_block);
    }
  }

  void pool_tiles(const SequenceState& in, std::span<Tile> tiles, std::int64_t block) {
    threads_.for_each(static_cast<std::int64_t>(tiles.size()), [&](std::int64_t i, int thread) {
      const std::int64_t first = i * kPageSize;
      const std::int64_t count = std::min<std::int64_t>(kPageSize, in.n / block - first);
      load_mean_tile(kernels_, problem_, in.queries.first, in.sums, block, first,
                     static_cast<int>(count), workspace_.threads[thread].means, tiles[i]);
    });
  }

  // Stage 2.
  void route() {
    threads_.for_each(block_count_, [&](std::int64_t b, int thread) {
      const QueryBlock& block = workspace_.blocks[b];
      Thread& scratch = workspace_.threads[thread];
      scratch.sample_stride = 0;
      for (std::int64_t i = 0; i < block.count; ++i) {
        prepare(block.first + i, workspace_.sequences[block.sequence], scratch);
      }
    });
  }

  void prepare(std::int64_t t, const SequenceState& in, Thread& scratch) {
    QueryState& state = query(t);
    state.n = problem_.visible(t);
    const bool dense = config_.takes_every_head(needs_.heads, state.n);
    state.filtered = !dense && needs_.filtered &&
                     ceil_div(state.n, config_.filter_block) > config_.filter_blocks;
    // Where every position is a candidate, all heads score them in stage 3, which shares the pages.
    state.reranked = !dense && needs_.reranked && (state.filtered || state.n > config_.candidates);
    state.scored = state.n > config_.top_k || (state.n > 0 && !problem_.out.scores.empty());
    const std::int64_t keep = state.reranked ? needs_.keep : needs_.final_keep;
    state.selectors = &workspace_.selectors[(t - wave_first_) * parts_];
    for (std::int64_t part = 0; part < parts_; ++part) {
      Selector& selector = state.selectors[part];
      selector = {selector.entries, 0, needs_.capacity, keep, 0};
    }
    const bool routed = !dense && config_.router != Router::all;
    const bool reported = !problem_.out.heads.empty() || !problem_.out.residual.empty();
    if (dense) {
      std::ranges::fill(heads_out(t), -1);
      std::ranges::fill(residual_out(t), 0.0F);
    }
    if (state.scored || (routed && reported)) {
      const Heads heads = all_heads(t, scratch);
      if (state.filtered) {
        keep_blocks(t, in, heads, scratch);
      }
      if (routed && (reported || state.reranked || !needs_.reranked)) {
        choose_rows(t, in, heads, scratch);
      }
      if (!routed || state.reranked != needs_.reranked) {
        set_rows(state, heads);
      }
    }
  }

  Heads all_heads(std::int64_t t, Thread& scratch) {
    load_heads(kernels_, problem_, t, needs_.operand, scratch.rows);
    if (needs_.pooled || needs_.filtered) {
      load_heads(kernels_, problem_, t, Operand::f32, scratch.rows_f32);
    }
    for (std::int64_t j = 0; j < needs_.heads; ++j) {
      scratch.weight[j] = problem_.weight(t, j);
    }
    return {scratch.rows, scratch.rows_f32, scratch.weight, static_cast<int>(needs_.heads),
            needs_.operand};
  }

  // The blocks that query t sees; `partial` receives the mean of the one it stands in.
  BlockMeans block_means(std::int64_t t, const SequenceState& in, std::span<Tile> tiles,
                         std::int64_t block, Thread& scratch, Tile& partial) {
    const std::int64_t n = query(t).n;
    BlockMeans means{tiles.first(ceil_div(n / block, kPageSize)), n / block, nullptr};
    if (n % block != 0) {
      load_partial_mean(kernels_, problem_, t, in.sums, block, n, scratch.means, partial);
      means.partial = &partial;
    }
    return means;
  }

  void keep_blocks(std::int64_t t, const SequenceState& in, const Heads& heads, Thread& scratch) {
    QueryState& state = query(t);
    const BlockMeans means =
        block_means(t, in, in.filter, config_.filter_block, scratch, scratch.partial_filter);
    block_scores(kernels_, heads, means, scratch.block_scores);
    const std::int64_t blocks = ceil_div(state.n, config_.filter_block);
    cpu::keep_blocks({scratch.block_scores, static_cast<std::size_t>(blocks)},
                     config_.filter_blocks, scratch.ranking, scratch.indices,
                     {state.kept, static_cast<std::size_t>(needs_.filter_words)});
  }

  // The sampled keys that query t sees; the tiles serve all queries of a block with the same grid.
  Samples samples(std::int64_t t, const SequenceState& in, Thread& scratch) {
    const std::int64_t n = query(t).n;
    const std::int64_t stride = sample_stride(n);
    const std::int64_t count = ceil_div(n, stride);
    if (stride != scratch.sample_stride || count > scratch.sample_count) {
      scratch.sample_stride = stride;
      scratch.sample_count = std::min(ceil_div(in.n, stride), kMaxSamples);
      for (std::int64_t first = 0; first < scratch.sample_count; first += kPageSize) {
        std::uint32_t positions[kPageSize];
        const std::int64_t in_tile =
            std::min<std::int64_t>(kPageSize, scratch.sample_count - first);
        for (std::int64_t i = 0; i < in_tile; ++i) {
          const std::int64_t position = (first + i) * stride;
          positions[i] = static_cast<std::uint32_t>(position);
          const Key key = problem_.key(t, position);
          scratch.sample_squares[first + i] = kernels_.sum_squares(
              key.data, problem_.k_dtype(), key.scale, static_cast<int>(needs_.dim));
        }
        load_tile(kernels_, problem_, t, {positions, static_cast<std::size_t>(in_tile)},
                  needs_.operand, scratch.pack, scratch.sample[first / kPageSize]);
      }
    }
    float squares = 0;
    for (std::int64_t i = 0; i < count; ++i) {
      squares += scratch.sample_squares[i];
    }
    const float rms = std::sqrt(squares / static_cast<float>(count * needs_.dim));
    return {std::span<const Tile>(scratch.sample).first(ceil_div(count, kPageSize)),
            static_cast<int>(count), rms};
  }

  void choose_rows(std::int64_t t, const SequenceState& in, const Heads& heads, Thread& scratch) {
    float rms = 0;
    if (needs_.sampled) {
      const Samples sampled = samples(t, in, scratch);
      fit_heads(kernels_, heads, sampled, scratch.dots, scratch.fit);
      rms = sampled.rms;
    }
    const std::span<const std::int32_t> active = choose_heads(t, in, heads, rms, scratch);
    std::copy_n(active.begin(), heads_out(t).size(), heads_out(t).begin());
    std::span<const float> residual;
    if (config_.residual) {
      residual_row(kernels_, problem_, t, active, scratch.fit.slope, scratch.residual);
      std::copy_n(scratch.residual, residual_out(t).size(), residual_out(t).begin());
      residual = {scratch.residual, static_cast<std::size_t>(needs_.dim)};
    }
    set_rows(query(t), heads, active, residual);
  }

  std::span<const std::int32_t> choose_heads(std::int64_t t, const SequenceState& in,
                                             const Heads& heads, float rms, Thread& scratch) {
    const std::span<float> values(scratch.values, static_cast<std::size_t>(needs_.heads));
    switch (config_.router) {
      case Router::all: break;
      case Router::pooled:
        pooled_values(kernels_, heads,
                      block_means(t, in, in.pooled, config_.block, scratch, scratch.single),
                      scratch.dots, values.data());
        break;
      case Router::nonlinearity:
        nonlinearity_values(kernels_, problem_, t, heads, scratch.fit, rms, values.data());
        break;
      case Router::dispersion:
        for (std::size_t j = 0; j < values.size(); ++j) {
          values[j] = std::abs(heads.weight[j]) * scratch.fit.dispersion[j];
        }
        break;
      case Router::self:
        load_page(kernels_, problem_, t, query(t).n - 1, 1, needs_.operand, scratch.pack,
                  scratch.single);
        self_values(kernels_, heads, scratch.single, scratch.dots, values.data());
        break;
      case Router::qnorm:
        for (std::size_t j = 0; j < values.size(); ++j) {
          values[j] = kernels_.sum_squares(problem_.query(t, static_cast<std::int64_t>(j)),
                                           problem_.q.dtype, 1.0F, static_cast<int>(needs_.dim));
        }
        break;
      case Router::weight:
        std::ranges::transform(std::span(heads.weight, values.size()), values.begin(),
                               [](float w) { return std::abs(w); });
        break;
      case Router::fixed:
        std::ranges::copy(config_.static_heads, scratch.indices);
        std::sort(scratch.indices, scratch.indices + config_.heads);
        return {scratch.indices, static_cast<std::size_t>(config_.heads)};
    }
    top_indices(values, config_.heads, scratch.ranking, scratch.indices);
    return {scratch.indices, static_cast<std::size_t>(config_.heads)};
  }

  // All heads, in place of a choice.
  void set_rows(QueryState& state, const Heads& heads) {
    std::copy_n(static_cast<const std::byte*>(heads.rows), heads.count * row_bytes(),
                state.row_data);
    std::copy_n(heads.weight, heads.count, state.weight);
    std::fill_n(state.floor, heads.count, 0.0F);
    state.rows = {state.row_data, state.weight, state.floor, heads.count};
  }

  // The active heads, then the residual's rows.
  void set_rows(QueryState& state, const Heads& heads, std::span<const std::int32_t> active,
                std::span<const float> residual) {
    int count = 0;
    for (const std::int32_t j : active) {
      std::copy_n(static_cast<const std::byte*>(heads.rows) + j * row_bytes(), row_bytes(),
                  state.row_data + count * row_bytes());
      state.weight[count] = heads.weight[j];
      state.floor[count] = 0.0F;
      ++count;
    }
    if (!residual.empty()) {
      float weight = 0;
      const int rows = split_residual(residual, problem_.k_dtype(), needs_.operand,
                                      state.row_data + count * row_bytes(), weight);
      std::fill_n(state.weight + count, rows, weight);
      std::fill_n(state.floor + count, rows, kNoFloor);
      count += rows;
    }
    state.rows = {state.row_data, state.weight, state.floor, count};
  }

  // Stage 3.
  void score() {
    threads_.for_each(block_count_ * parts_, [&](std::int64_t i, int thread) {
      score_block(workspace_.blocks[i / parts_], i % parts_, workspace_.threads[thread]);
    });
  }

  void score_block(const QueryBlock& block, std::int64_t part, Thread& scratch) {
    std::int64_t longest = 0;
    for (std::int64_t i = 0; i < block.count; ++i) {
      const QueryState& state = query(block.first + i);
      longest = std::max(longest, state.scored ? state.n : 0);
    }
    const std::int64_t pages = ceil_div(longest, kPageSize);
    // Pages in golden-ratio steps: whatever the trend of the scores along the context, the pages
    // seen so far are a fair sample of it and the selectors' thresholds rise early.
    std::int64_t stride = std::max<std::int64_t>(1, pages * 618 / 1000);
    while (std::gcd(stride, pages) > 1) {
      ++stride;
    }
    alignas(64) float scores[kPageSize];
    const std::int64_t end = pages * (part + 1) / parts_;
    for (std::int64_t i = pages * part / parts_; i < end; ++i) {
      const std::int64_t first = i * stride % pages * kPageSize;
      bool packed = false;
      for (std::int64_t q = 0; q < block.count; ++q) {
        QueryState& state = query(block.first + q);
        if (!state.scored || state.n <= first || !kept(state, first)) {
          continue;
        }
        if (!packed) {
          const std::int64_t in_page = std::min<std::int64_t>(kPageSize, longest - first);
          load_page(kernels_, problem_, block.first, first, static_cast<int>(in_page),
                    needs_.operand, scratch.pack, scratch.tile);
          packed = true;
          if (i + 1 < end) {
            const std::int64_t next = (i + 1) * stride % pages * kPageSize;
            prefetch_page(problem_, block.first, next,
                          static_cast<int>(std::min<std::int64_t>(kPageSize, longest - next)));
          }
        }
        const int valid = static_cast<int>(std::min<std::int64_t>(kPageSize, state.n - first));
        kernels_.score(needs_.operand, state.rows, scratch.tile, valid, scores);
        kernels_.offer(scores, scratch.tile.position, valid, state.selectors[part], scratch.select);
      }
    }
  }

  [[nodiscard]] bool kept(const QueryState& state, std::int64_t position) const {
    if (!state.filtered) {
      return true;
    }
    const std::int64_t block = position / config_.filter_block;
    return (state.kept[block / 64] >> (block % 64) & 1) != 0;
  }

  // Stage 4.
  void finish(std::int64_t t, Thread& scratch) {
    QueryState& state = query(t);
    Selector& selector = state.selectors[0];
    if (state.scored) {
      for (std::int64_t part = 1; part < parts_; ++part) {
        merge(kernels_, state.selectors[part], selector, scratch.select);
      }
      kernels_.compact(selector, scratch.select);
      sort_by_position(selector.entries, selector.count, state.n, scratch.select);
    } else {
      selector.count = state.n;
      for (std::int64_t i = 0; i < selector.count; ++i) {
        selector.entries[i] = static_cast<std::uint64_t>(i) << 32;
      }
    }
    std::span<const std::uint64_t> pairs(selector.entries,
                                         static_cast<std::size_t>(selector.count));
    if (state.reranked) {
      const Heads heads = all_heads(t, scratch);
      const QueryRows rows{heads.rows, heads.weight, scratch.floor, heads.count};
      Selector best{scratch.final_entries, 0, needs_.final_capacity, needs_.final_keep, 0};
      rerank(kernels_, problem_, t, pairs, rows, needs_.operand, scratch.pack, scratch.tile, best,
             scratch.select);
      sort_by_position(best.entries, best.count, state.n, scratch.select);
      pairs = {best.entries, static_cast<std::size_t>(best.count)};
    }
    write_row(pairs, t, config_.top_k, problem_.out);
  }

  [[nodiscard]] std::int64_t row_bytes() const {
    return needs_.dim * static_cast<std::int64_t>(size_of(needs_.operand));
  }

  std::span<std::int32_t> heads_out(std::int64_t t) const {
    return problem_.out.heads.empty()
               ? std::span<std::int32_t>()
               : problem_.out.heads.subspan(t * config_.heads, config_.heads);
  }

  std::span<float> residual_out(std::int64_t t) const {
    return problem_.out.residual.empty()
               ? std::span<float>()
               : problem_.out.residual.subspan(t * needs_.dim, needs_.dim);
  }

  const Kernels& kernels_;
  const Problem& problem_;
  const IndexerConfig& config_;
  const Needs& needs_;
  const Threads& threads_;
  Bump bump_;
  Workspace workspace_;
  std::int64_t wave_first_ = 0;
  std::int64_t sequence_count_ = 0;
  std::int64_t block_count_ = 0;
  std::int64_t parts_ = 1;
};

class CpuPlan final : public BackendPlan {
 public:
  CpuPlan(const Kernels& kernels, const Needs& needs, const Threads& threads)
      : kernels_(kernels), needs_(needs), threads_(threads) {}

  std::size_t workspace_bytes() const override { return bytes_for(needs_); }

  void run(const Problem& problem, std::span<std::byte> workspace) const override {
    Run(kernels_, problem, needs_, threads_, workspace).run();
  }

 private:
  const Kernels& kernels_;
  Needs needs_;
  const Threads& threads_;
};

class CpuBackend final : public Backend {
 public:
  explicit CpuBackend(const Kernels& kernels) : kernels_(kernels) {}

  BackendInfo info() const override {
    return {kernels_.name, kernels_.isa, kernels_.requirement, kernels_.available(),
            kernels_.priority};
  }

  std::unique_ptr<const BackendPlan> plan(const IndexerConfig& config, const Shape& shape,
                                          const Context::State& context) const override {
    return std::make_unique<CpuPlan>(kernels_, largest_wave(config, shape, kernels_, context),
                                     context.threads);
  }

 private:
  const Kernels& kernels_;
};

}  // namespace
}  // namespace misa::cpu

namespace misa {

std::span<const Backend* const> cpu_backends() {
  static const std::vector<cpu::CpuBackend> objects = [] {
    std::vector<cpu::CpuBackend> list;
    for (const cpu::Kernels* kernels : cpu::kernels()) {
      list.emplace_back(*kernels);
    }
    return list;
  }();
  static const std::vector<const Backend*> pointers = [] {
    std::vector<const Backend*> list;
    for (const cpu::CpuBackend& object : objects) {
      list.push_back(&object);
    }
    return list;
  }();
  return pointers;
}

}  // namespace misa
