// SPDX-License-Identifier: Apache-2.0
// misa select: the positions that each query of a file attends to.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/App.hpp>
#include <algorithm>
#include <array>
#include <chrono>
#include <cstdint>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "bad_input.hpp"
#include "buffer.hpp"
#include "commands.hpp"
#include "misa/indexer.hpp"
#include "options.hpp"
#include "output_file.hpp"
#include "progress.hpp"
#include "safetensors.hpp"
#include "streams.hpp"
#include "trace.hpp"
#include "variant.hpp"

namespace misa::cli {
namespace {

struct Options {
  std::string input;
  std::string output;
  std::string indexer = "dsa";
  int top_k = IndexerConfig().top_k;
  // Options that only some indexers have, with defaults that depend on the indexer.
  std::optional<int> heads;
  std::optional<int> block;
  std::optional<int> candidates;
  int sketch = 0;
  std::optional<std::int64_t> dense_work;
  std::optional<int> filter_block;
  std::optional<int> filter_blocks;
  std::optional<std::string> router;
  std::vector<std::int32_t> static_heads;
  bool ordered = false;
  bool scores = false;
  bool json = false;
  RunOptions run;
};

// The named indexer with the given options. An option that the indexer would ignore is refused.
IndexerConfig config_from(const Options& options) {
  IndexerConfig config = indexer_by_name(options.indexer, options.top_k);
  config.ordered = options.ordered;

  const bool filtered = config.filter_block > 0;
  require(filtered || !options.filter_block, "--hisa-block: expected --indexer hisa, got {}",
          options.indexer);
  require(filtered || !options.filter_blocks, "--hisa-blocks: expected --indexer hisa, got {}",
          options.indexer);
  config.filter_block = options.filter_block.value_or(config.filter_block);
  config.filter_blocks = options.filter_blocks.value_or(config.filter_blocks);

  if (options.router) {
    require(options.indexer != "dsa", "--router: expected an indexer that routes heads, got dsa");
    config.router = router_by_name(*options.router);
  }
  const bool routed = config.router != Router::all;
  const std::string_view unrouted = filtered ? "hisa without --router" : "dsa";
  require(routed || !options.heads, "--heads: expected an indexer that routes heads, got {}",
          unrouted);
  require(!routed || !filtered || options.heads || config.router == Router::fixed,
          "--heads: expected a number of heads with --indexer hisa --router {}, got none",
          name_of(config.router));
  require(routed || options.sketch != 0 || options.candidates.value_or(0) == 0,
          "--candidates: expected an indexer that routes heads, or --sketch, got {}", unrouted);
  require(options.sketch == 0 || options.candidates != 0,
          "--candidates: expected 1 or more with --sketch, whose scores are ranked again, got 0");
  require(options.indexer != "misa-dagger" || options.candidates != 0,
          "--candidates: expected 1 or more with --indexer misa-dagger, which re-ranks, got 0");
  require(options.indexer != "dsa" || !options.dense_work,
          "--dense-work: expected an indexer that leaves heads or keys out, got dsa");
  require(config.router == Router::pooled || !options.block,
          "--block: expected the router pooled, got {}", name_of(config.router));
  require(config.router == Router::fixed || options.static_heads.empty(),
          "--static-heads: expected --router static, got {}", name_of(config.router));
  require(config.router != Router::fixed || !options.static_heads.empty(),
          "--static-heads: expected a list with --router static, got none");
  config.static_heads = options.static_heads;
  if (config.router == Router::fixed) {
    config.heads = static_cast<int>(options.static_heads.size());
  }
  config.heads = options.heads.value_or(config.heads);
  config.block = options.block.value_or(config.block);
  config.sketch = options.sketch;
  config.candidates = options.candidates.value_or(
      options.sketch == 0 ? config.candidates
                          : IndexerConfig::candidates_of_sketch(options.sketch, options.top_k));
  config.dense_work = options.dense_work.value_or(config.dense_work);
  return config;
}

// The queries [first, first + count) of the inputs; with paged keys, whole sequences.
StepInputs rows_of(const StepInputs& all, std::int64_t first, std::int64_t count) {
  StepInputs rows = all;
  const std::int64_t values = first * all.q.heads * all.q.dim;
  rows.q.data = static_cast<const std::byte*>(all.q.data) +
                values * static_cast<std::int64_t>(size_of(all.q.dtype));
  rows.q.tokens = count;
  rows.w.data = all.w.data + first * all.w.heads;
  rows.w.tokens = count;
  if (auto* ragged = std::get_if<RaggedKeys>(&rows.k)) {
    ragged->starts = ragged->starts.subspan(first, count);
    ragged->ends = ragged->ends.subspan(first, count);
  } else {
    auto& paged = std::get<PagedKeys>(rows.k);
    paged.block_table += first / paged.next_n * paged.max_pages;
    paged.context_lens = paged.context_lens.subspan(first / paged.next_n, count / paged.next_n);
  }
  return rows;
}

// Queries in one run of the plan: enough to occupy every thread, few enough to show progress and to
// keep the results small.
std::int64_t rows_at_a_time(const StepInputs& inputs, int top_k) {
  constexpr std::int64_t kRows = 256;
  constexpr std::int64_t kBytes = std::int64_t{64} << 20;
  constexpr std::int64_t kEntry = 8;  // an index and a score
  const std::int64_t rows = std::clamp<std::int64_t>(kBytes / (kEntry * top_k), 1, kRows);
  const auto* paged = std::get_if<PagedKeys>(&inputs.k);
  const std::int64_t least = paged == nullptr ? 1 : paged->next_n;  // whole sequences
  return std::max<std::int64_t>(1, rows / least) * least;
}

// The result arrays of one chunk, and the file to which they are appended.
class Output {
 public:
  Output(const std::string& path, const IndexerConfig& config, const StepInputs& inputs,
         bool with_scores, std::int64_t chunk_rows)
      : file_(path, tensors(config, inputs, with_scores), {}),
        dim_(inputs.q.dim),
        top_k_(config.top_k),
        heads_(config.router == Router::all ? 0 : config.heads) {
    indices_.resize(chunk_rows * top_k_);
    scores_.resize(with_scores ? chunk_rows * top_k_ : 0);
    head_list_.resize(chunk_rows * heads_);
    residual_.resize(config.residual ? chunk_rows * dim_ : 0);
  }

  // The first `count` rows of the arrays.
  [[nodiscard]] Selection rows(std::int64_t count) {
    return {first(indices_, count * top_k_), first(scores_, count * top_k_),
            first(head_list_, count * heads_), first(residual_, count * dim_)};
  }

  void append(const Selection& rows) {
    append("indices", rows.indices);
    append("scores", rows.scores);
    append("heads", rows.heads);
    append("residual", rows.residual);
  }

  void commit() { file_.commit(); }
  [[nodiscard]] std::uint64_t bytes() const { return file_.file_bytes(); }

 private:
  static std::vector<TensorInfo> tensors(const IndexerConfig& config, const StepInputs& inputs,
                                         bool with_scores) {
    const std::int64_t rows = inputs.q.tokens;
    std::vector<TensorInfo> list{tensor_info("indices", "I32", {rows, config.top_k})};
    if (with_scores) {
      list.push_back(tensor_info("scores", "F32", {rows, config.top_k}));
    }
    if (config.router != Router::all) {
      list.push_back(tensor_info("heads", "I32", {rows, config.heads}));
    }
    if (config.residual) {
      list.push_back(tensor_info("residual", "F32", {rows, inputs.q.dim}));
    }
    return list;
  }

  // An output that was not requested stays empty.
  template <class T>
  static std::span<T> first(std::vector<T>& array, std::int64_t count) {
    return std::span(array).first(std::min(array.size(), static_cast<std::size_t>(count)));
  }

  template <class T>
  void append(std::string_view name, std::span<T> values) {
    if (!values.empty()) {
      file_.append(name, std::as_bytes(values));
    }
  }

  SafetensorsWriter file_;
  std::int64_t dim_;
  std::int64_t top_k_;
  std::int64_t heads_;
  std::vector<std::int32_t> indices_;
  std::vector<float> scores_;
  std::vector<std::int32_t> head_list_;
  std::vector<float> residual_;
};

void report(const Options& options, const Context& context, const Plan& plan,
            const StepInputs& inputs, double seconds, std::uint64_t bytes) {
  const auto rows = static_cast<double>(std::max<std::int64_t>(1, inputs.q.tokens));
  const double microseconds = 1e6 * seconds / rows;
  if (!options.json) {
    print_out(
        "{}: top {} of up to {} keys for {} queries with {} on {}: {:.3g} s, {:.4g} µs a "
        "query\n",
        one_line(options.output), options.top_k, plan.shape().max_keys, inputs.q.tokens,
        options.indexer, context.backend(), seconds, microseconds);
    return;
  }
  print_json({{"in", options.input},
              {"out", options.output},
              {"indexer", options.indexer},
              {"settings", settings_of(plan.config())},
              {"queries", inputs.q.tokens},
              {"heads", inputs.q.heads},
              {"dim", inputs.q.dim},
              {"max_keys", plan.shape().max_keys},
              {"backend", context.backend()},
              {"threads", context.threads()},
              {"seconds", seconds},
              {"us_per_query", microseconds},
              {"workspace_bytes", plan.workspace_bytes()},
              {"out_bytes", bytes}});
}

// Selects chunk by chunk; returns the seconds spent in the plan.
double select_into(Output& output, const Plan& plan, const StepInputs& inputs) {
  const Buffer workspace(plan.workspace_bytes());
  const std::int64_t total = inputs.q.tokens;
  const std::int64_t chunk = plan.shape().tokens;
  Progress progress("selecting", total);
  std::chrono::duration<double> spent{};
  for (std::int64_t first = 0; first < total; first += chunk) {
    const StepInputs rows = rows_of(inputs, first, std::min(chunk, total - first));
    const Selection out = output.rows(rows.q.tokens);
    const auto start = std::chrono::steady_clock::now();
    std::visit([&](const auto& keys) { plan.run(rows.q, rows.w, keys, out, workspace.span()); },
               rows.k);
    spent += std::chrono::steady_clock::now() - start;
    output.append(out);
    progress.add(rows.q.tokens);
  }
  return spent.count();
}

void run(const Options& options) {
  require_no_overwrite(options.output, std::span(&options.input, 1));
  const IndexerConfig config = config_from(options);
  const Context context = make_context(options.run);
  const Trace trace(options.input);
  const StepInputs& inputs = trace.inputs();
  Shape shape = inputs.shape();
  shape.tokens = std::min(inputs.q.tokens, rows_at_a_time(inputs, options.top_k));
  const Plan plan(context, config, shape);
  Output output(options.output, config, inputs, options.scores, shape.tokens);
  const double seconds = select_into(output, plan, inputs);
  output.commit();
  report(options, context, plan, inputs, seconds, output.bytes());
}

// Adds an option for a number that stays empty if it is not given.
template <class T>
void add_number(CLI::App& command, const std::string& name, std::optional<T>& value, int least,
                const std::string& help) {
  command.add_option(name, value, help)
      ->type_name("N")
      ->check(whole_number(least, std::numeric_limits<T>::max()));
}

constexpr std::array<std::string_view, 3> kSketches{"0", "2", "4"};

constexpr const char* kFooter = R"(Indexers (µs beside recall: `misa compare`):
  dsa          every head scores every key
  misa         8 heads a query, chosen by block means, score every key
  misa-dagger  as misa, then the top 8192 are ranked again by every head
  hisa         every head scores the keys of the best 64 blocks of 128
  misa-r       7 heads, and one linear row for the others, score every key
  auto         as dsa up to 512 N heads x keys, beyond as misa-r with 3 heads, then the top 2 N are
               ranked again by every head (N: --top-k)

IN holds q [T,H,D], w [T,H] (F32) and k [L,D]; q and k are F32, BF16 or F8_E4M3 (k then with
k_scale [L], F32). Query t sees the keys ks[t] <= s < ke[t] (I32; absent: 0 and L-T+t+1). Or, paged,
q [B,next_n,H,D], w [B,next_n,H], cache [pages,page_size,D+4] (U8), block_table [B,max_pages] and
context_lens [B] (I32). H is 1 to 256, D is 64 or 128, page_size is 32, 64 or 128. Other tensors are
not read.

OUT holds indices [T,N] (I32): positions from the query's first key on, -1 on the right where a query
sees fewer than N; with --scores also scores [T,N] (F32); heads [T,h] (I32) where heads are routed;
residual [T,D] (F32) of misa-r and auto. It appears whole or not at all.

Examples:
  misa select trace.safetensors -o selected.safetensors --indexer misa-r --heads 3 --candidates 4096
  misa select trace.safetensors -o dense.safetensors --top-k 512 --scores --backend reference
  misa select trace.safetensors -o routed.safetensors --indexer misa --router static \
      --static-heads 1,5,12,40)";

}  // namespace

void add_select(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "select", "The positions of its context that each query attends to, from file to file");
  const auto options = std::make_shared<Options>();
  command->add_option("IN", options->input, "Queries, weights and keys: a safetensors file")
      ->required();
  command->add_option("-o,--output", options->output, "Where the result goes")
      ->type_name("OUT")
      ->required();
  command
      ->add_option("--indexer", options->indexer,
                   fmt::format("One of {}", fmt::join(indexer_names(), ", ")))
      ->type_name("NAME")
      ->check(one_of(indexer_names()))
      ->capture_default_str();
  command->add_option("--top-k", options->top_k, "Positions wanted a query")
      ->type_name("N")
      ->transform(size_number(1, std::numeric_limits<int>::max()))
      ->capture_default_str();
  add_number(*command, "--heads", options->heads, 0,
             "Heads that are routed to (misa and misa-dagger: 8, misa-r: 7, auto: 3)");
  add_number(*command, "--candidates", options->candidates, 0,
             "Positions that every head ranks again; 0: no re-rank (with --sketch 2: 8 times "
             "top-k, with --sketch 4: twice; misa-dagger: 8192, auto: twice, others: 0)");
  command
      ->add_option("--sketch", options->sketch,
                   "Score before the re-rank by a sketch of so many bits an element, 2 or 4, of "
                   "keys that are F8_E4M3; 0: by the keys themselves")
      ->type_name("BITS")
      ->check(one_of(kSketches))
      ->capture_default_str();
  add_number(*command, "--dense-work", options->dense_work, 0,
             "Queries of at most so many heads x keys are selected for as dsa does; 0: none (auto: "
             "512 times top-k, others: 0)");
  command
      ->add_option("--router", options->router,
                   "How heads are chosen: pooled, nonlinearity, dispersion, self, qnorm, weight or "
                   "static (misa, misa-dagger: pooled, misa-r, auto: nonlinearity, hisa: none)")
      ->type_name("NAME")
      ->check(one_of(router_names().subspan(1)));  // without `all`, which does not route
  add_number(*command, "--block", options->block, 1,
             "Keys in a block of the pooled router, a multiple of 64 (1024)");
  command
      ->add_option("--static-heads", options->static_heads,
                   "The heads of --router static, as 1,5,12")
      ->type_name("LIST")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(whole_number(0));
  add_number(*command, "--hisa-block", options->filter_block, 1,
             "Keys in a block of hisa, a multiple of 64 (128)");
  add_number(*command, "--hisa-blocks", options->filter_blocks, 2,
             "Blocks that hisa keeps, the first and the last included (64)");
  command->add_flag("--scores", options->scores, "Also write the scores that ranked the positions");
  command->add_flag("--ordered", options->ordered, "Positions ascend inside a row");
  add_run_options(*command, options->run);
  add_json_option(*command, options->json);
  command->footer(kFooter);
  command->callback([options] { run(*options); });
}

}  // namespace misa::cli
