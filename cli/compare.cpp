// SPDX-License-Identifier: Apache-2.0
// misa compare: how much of DSA's set each indexer finds, and what it costs.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/App.hpp>
#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <limits>
#include <memory>
#include <optional>
#include <span>
#include <string>
#include <vector>

#include "bad_input.hpp"
#include "commands.hpp"
#include "metrics.hpp"
#include "misa/error.hpp"
#include "options.hpp"
#include "output_file.hpp"
#include "progress.hpp"
#include "provenance.hpp"
#include "report.hpp"
#include "step.hpp"
#include "streams.hpp"
#include "summary.hpp"
#include "timing.hpp"
#include "trace.hpp"
#include "variant.hpp"

namespace misa::cli {
namespace {

// 1024 positions are 1/16 of a context of 16K, as DSA's 2048 positions are of 32K.
constexpr int kTopK = 1024;

// Heads per query in the page's plot of which heads the routers choose; MISA's default.
constexpr std::int64_t kHeadUseHeads = 8;

struct Options {
  std::vector<std::string> files;
  std::vector<std::string> indexers = default_variants();
  std::string html;
  int top_k = kTopK;
  int runs = 5;
  RunOptions run;
  bool fp8 = false;
  bool json = false;
};

// The attention of a query over the positions that it sees.
struct AttentionRow {
  std::int64_t t;
  std::vector<float> weights;
};

// The part that one trace has in the progress of all.
class TraceProgress {
 public:
  static constexpr std::int64_t kWhole = 1'000'000;

  TraceProgress(Progress& all, std::int64_t passes, std::int64_t queries)
      : all_(all), queries_(queries), total_(std::max<std::int64_t>(1, passes * queries)) {}

  // So many queries of a pass are done.
  void add(std::int64_t queries) {
    const std::int64_t before = kWhole * done_ / total_;
    done_ += queries;
    all_.add(kWhole * done_ / total_ - before);
  }
  void add_pass() { add(queries_); }

 private:
  Progress& all_;
  std::int64_t queries_;
  std::int64_t total_;
  std::int64_t done_ = 0;
};

// The positions [T, top_k] that a configuration selects.
using Positions = std::vector<std::int32_t>;

Positions select_all(const Context& context, const IndexerConfig& config, const StepInputs& inputs,
                     TraceProgress& progress) {
  return select_in_parts(context, config, inputs, [&](std::int64_t n) { progress.add(n); });
}

// Compares selections on one trace with DSA's selection and with the attention recorded in the
// file, over the rows that see more than top_k keys.
class Evaluator {
 public:
  Evaluator(const Context& context, const Trace& trace, int top_k, TraceProgress& progress)
      : top_k_(top_k),
        dense_(select_all(context, IndexerConfig::dsa(top_k), trace.inputs(), progress)) {
    for (std::int64_t t = 0; t < trace.inputs().q.tokens; ++t) {
      if (trace.inputs().visible(t) > top_k) {
        rows_.push_back(t);
      }
    }
    for (const std::int64_t t : rows_) {
      if (trace.has_attention(t)) {
        attention_.push_back({t, trace.attention(t)});
      }
    }
  }

  [[nodiscard]] const Positions& dense() const { return dense_; }
  [[nodiscard]] std::int64_t rows() const { return std::ssize(rows_); }

  [[nodiscard]] std::optional<Summary> recall_of(const Positions& selected) const {
    if (rows_.empty()) {
      return std::nullopt;
    }
    std::vector<double> shares;
    for (const std::int64_t t : rows_) {
      shares.push_back(recall(row(selected, t), row(dense_, t)));
    }
    return summarize(shares);
  }

  [[nodiscard]] std::optional<AttentionKept> attention_of(const Positions& selected) const {
    if (attention_.empty()) {
      return std::nullopt;
    }
    const double kept = mass(selected);
    return AttentionKept{kept, kept / mass(dense_)};
  }

  // The most attention that top_k positions can hold.
  [[nodiscard]] std::optional<double> attention_bound() const {
    if (attention_.empty()) {
      return std::nullopt;
    }
    std::vector<double> shares;
    for (const AttentionRow& attention : attention_) {
      shares.push_back(best_attention_mass(attention.weights, top_k_));
    }
    return mean(shares);
  }

 private:
  [[nodiscard]] std::span<const std::int32_t> row(const Positions& selected, std::int64_t t) const {
    return std::span(selected).subspan(static_cast<std::size_t>(t * top_k_),
                                       static_cast<std::size_t>(top_k_));
  }

  [[nodiscard]] double mass(const Positions& selected) const {
    std::vector<double> shares;
    for (const AttentionRow& attention : attention_) {
      shares.push_back(attention_mass(row(selected, attention.t), attention.weights));
    }
    return mean(shares);
  }

  int top_k_;
  Positions dense_;
  std::vector<std::int64_t> rows_;
  std::vector<AttentionRow> attention_;
};

// 1, 2, 4, … below H, then H.
std::vector<int> head_counts(std::int64_t heads) {
  std::vector<int> counts;
  for (int h = 1; h < heads; h *= 2) {
    counts.push_back(h);
  }
  counts.push_back(static_cast<int>(heads));
  return counts;
}

// Mean recall for each number of heads h: MISA, and MISA-R, which also runs with h = 0. Needs rows
// that see more than top_k keys.
std::vector<Curve> recall_by_heads(const Context& context, const StepInputs& inputs,
                                   const Evaluator& evaluator, int top_k, TraceProgress& progress) {
  Curve misa{"MISA", {}};
  Curve misa_r{"MISA-R", {}};
  const auto add = [&](Curve& curve, const IndexerConfig& config) {
    const Positions selected = select_all(context, config, inputs, progress);
    curve.points.push_back(
        {static_cast<double>(config.heads), evaluator.recall_of(selected)->mean});
  };
  add(misa_r, IndexerConfig::misa_r(top_k, 0));
  for (const int h : head_counts(inputs.q.heads)) {
    add(misa, IndexerConfig::misa(top_k, h));
    add(misa_r, IndexerConfig::misa_r(top_k, h));
  }
  return {misa, misa_r};
}

constexpr std::array kRouters{Router::pooled, Router::nonlinearity, Router::dispersion,
                              Router::self,   Router::qnorm,        Router::weight};

// How often each router chooses each head, over the rows that see any key.
std::vector<HeadUse> head_use(const Context& context, const StepInputs& inputs, int heads,
                              int top_k, TraceProgress& progress) {
  double rows = 0;
  for (std::int64_t t = 0; t < inputs.q.tokens; ++t) {
    rows += inputs.visible(t) > 0 ? 1 : 0;
  }
  std::vector<HeadUse> use;
  for (const Router router : kRouters) {
    IndexerConfig config = IndexerConfig::dsa(top_k);
    config.router = router;
    config.heads = heads;
    const Selected selected = select(context, config, inputs, {.heads = true});
    std::vector<double> share(static_cast<std::size_t>(inputs.q.heads));
    for (const std::int32_t head : selected.heads) {
      if (head >= 0) {
        share[static_cast<std::size_t>(head)] += 1;
      }
    }
    std::transform(share.begin(), share.end(), share.begin(),
                   [rows](double count) { return count / rows; });
    use.push_back({std::string(name_of(router)), std::move(share)});
    progress.add_pass();
  }
  return use;
}

Timing divided(Timing timing, double by) {
  timing.median /= by;
  timing.fastest /= by;
  timing.slowest /= by;
  if (timing.spread) {
    *timing.spread /= by;
  }
  return timing;
}

// The times of steps of so many queries, in turn: seconds per query.
Timings time_queries(TimedSteps& steps, std::int64_t queries, int runs, TraceProgress& progress) {
  Timings timings = measure(runs, steps.contenders(), [&] { progress.add_pass(); });
  for (Timing& timing : timings.of) {
    timing = divided(timing, static_cast<double>(queries));
  }
  return timings;
}

// Parts of the context for which the page has times beside those of the whole.
constexpr std::array<std::int64_t, 3> kPrefixes{8, 4, 2};

// Seconds per query over prefixes of 1/8, 1/4, 1/2 of the context, and all of it, for which the
// table's times are taken.
std::vector<Curve> time_by_keys(const Context& context, const StepInputs& inputs,
                                const std::vector<Variant>& variants, int runs, TraceResult& result,
                                TraceProgress& progress) {
  const std::int64_t longest = inputs.shape().max_keys;
  std::vector<Curve> curves;
  for (const Variant& variant : variants) {
    curves.push_back({variant.label, {}});
  }
  for (const std::int64_t divisor : kPrefixes) {
    if (const std::int64_t keys = longest / divisor; keys > 0) {
      const Prefix prefix(inputs, keys);
      TimedSteps steps(context);
      for (const Variant& variant : variants) {
        about(variant, [&] { steps.add(variant.config, prefix.inputs()); });
      }
      const Timings timings = time_queries(steps, inputs.q.tokens, runs, progress);
      result.waited = more_waiting(result.waited, timings.waited);
      for (std::size_t i = 0; i < variants.size(); ++i) {
        curves[i].points.push_back({static_cast<double>(keys), timings.of[i].median});
      }
    }
  }
  for (std::size_t i = 0; i < variants.size(); ++i) {
    curves[i].points.push_back({static_cast<double>(longest), result.indexers[i].query.median});
  }
  return curves;
}

// How many times all queries of a trace are selected for, at most.
std::int64_t passes(std::int64_t variants, std::int64_t heads, const Options& options) {
  const std::int64_t timed = options.runs > 0 ? variants * (1 + std::int64_t{options.runs}) : 0;
  const std::int64_t plain = 1 + variants + timed;
  return options.html.empty()
             ? plain
             : plain + std::ssize(kRouters) + 1 + 2 * std::ssize(head_counts(heads)) +
                   std::ssize(kPrefixes) * timed;
}

TraceResult compare_trace(const Context& context, const std::string& file,
                          const std::vector<Variant>& variants, const Options& options,
                          Progress& all) {
  Trace trace(file);
  if (options.fp8) {
    trace.round_to_e4m3();
  }
  const StepInputs& inputs = trace.inputs();
  TimedSteps steps(context);  // made first, so that a wrong config fails before the work
  for (const Variant& variant : variants) {
    about(variant, [&] {
      require(variant.config.sketch == 0 || inputs.shape().k_dtype == DType::e4m3,
              "{}: expected F8_E4M3 keys for a sketch; --fp8 rounds others", file);
      steps.add(variant.config, inputs);
    });
  }
  TraceProgress progress(all, passes(std::ssize(variants), inputs.q.heads, options),
                         inputs.q.tokens);
  const Evaluator evaluator(context, trace, options.top_k, progress);
  TraceResult result;
  result.file = file;
  result.sha256 = sha256_of(file);
  result.layer = trace.layer();
  if (const auto model = trace.metadata().find("model"); model != trace.metadata().end()) {
    result.model = model->second;
  }
  result.shape = inputs.shape();
  result.long_rows = evaluator.rows();
  result.attention_bound = evaluator.attention_bound();
  for (const Variant& variant : variants) {
    about(variant, [&] {
      const Positions selected = variant.name == "dsa"
                                     ? evaluator.dense()
                                     : select_all(context, variant.config, inputs, progress);
      result.indexers.push_back({variant.name,
                                 variant.label,
                                 evaluator.recall_of(selected),
                                 evaluator.attention_of(selected),
                                 {},
                                 mean_cost(variant.config, inputs),
                                 steps.workspace_bytes(result.indexers.size()),
                                 variant.config});
    });
  }
  if (options.runs > 0) {
    const Timings timings = time_queries(steps, inputs.q.tokens, options.runs, progress);
    result.waited = timings.waited;
    for (std::size_t i = 0; i < variants.size(); ++i) {
      result.indexers[i].query = timings.of[i];
    }
  }
  if (!options.html.empty() && evaluator.rows() > 0) {
    const int heads = static_cast<int>(std::min(kHeadUseHeads, inputs.q.heads));
    result.sweeps = {heads,
                     head_use(context, inputs, heads, options.top_k, progress),
                     recall_by_heads(context, inputs, evaluator, options.top_k, progress),
                     {}};
    if (options.runs > 0) {
      result.sweeps->time_by_keys =
          time_by_keys(context, inputs, variants, options.runs, result, progress);
    }
  }
  return result;
}

// What facts() says under this name.
std::string fact(const std::vector<Fact>& facts, std::string_view name) {
  const auto at =
      std::find_if(facts.begin(), facts.end(), [&](const Fact& f) { return f.name == name; });
  return at == facts.end() ? std::string() : at->value;
}

std::string isa_of(std::string_view backend) {
  for (const BackendInfo& info : backends()) {
    if (info.name == backend) {
      return info.isa;
    }
  }
  return {};
}

Comparison compare(const Options& options) {
  const std::vector<Variant> variants = parse_variants(options.indexers, options.top_k);
  const Context context = make_context(options.run);
  Comparison comparison;
  comparison.version = version();
  comparison.date = utc_now();
  comparison.command = command_line();
  comparison.facts = facts();
  comparison.processor = fact(comparison.facts, "processor");
  comparison.backend = context.backend();
  comparison.isa = isa_of(context.backend());
  comparison.threads = context.threads();
  comparison.runs = options.runs;
  comparison.top_k = options.top_k;
  Progress progress("comparing", std::ssize(options.files) * TraceProgress::kWhole);
  for (const std::string& file : options.files) {
    comparison.traces.push_back(compare_trace(context, file, variants, options, progress));
    comparison.waited = more_waiting(comparison.waited, comparison.traces.back().waited);
  }
  name_traces(comparison.traces);
  return comparison;
}

void run(const Options& options) {
  std::optional<OutputFile> page;  // opened first, so that a wrong path fails before the work
  if (!options.html.empty()) {
    require_no_overwrite(options.html, options.files);
    page.emplace(options.html);
  }
  const Comparison comparison = compare(options);
  warn_if_busy(comparison.waited);
  if (page) {
    const std::string html = to_html(comparison);
    page->write_at(0, std::as_bytes(std::span(html)));
    page->commit();
  }
  if (options.json) {
    print_json(to_json(comparison));
    return;
  }
  write_out(to_text(comparison));
  if (page) {
    print_out("\nReport: {}\n", one_line(options.html));
  }
}

}  // namespace

void add_compare(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "compare",
      "How much of DSA's set each indexer finds on traces, what attention that holds, and what it "
      "costs");
  const auto options = std::make_shared<Options>();
  command->add_option("IN", options->files, "Traces: safetensors files, one a layer")
      ->type_name("FILE")
      ->required();
  command
      ->add_option("--indexers", options->indexers,
                   fmt::format("What to compare, separated by commas, in place of {}; {}",
                               fmt::join(default_variants(), ", "), kVariantHelp))
      ->type_name("LIST")
      ->delimiter(',')
      ->allow_extra_args(false);
  command
      ->add_option("--top-k", options->top_k,
                   "Positions wanted a query; the default suits contexts of 16K")
      ->type_name("N")
      ->transform(size_number(1, std::numeric_limits<int>::max()))
      ->capture_default_str();
  command
      ->add_option("--runs", options->runs,
                   "Runs that a time is the median of; 0: recall, no times")
      ->type_name("N")
      ->check(whole_number(0))
      ->capture_default_str();
  command
      ->add_option("--html", options->html,
                   "Writes a page with tables and plots, sweeps over h and the context's length "
                   "included; it needs no network to be viewed")
      ->type_name("FILE");
  command->add_flag("--fp8", options->fp8,
                    "Rounds queries and keys to F8_E4M3 first, as models with an FP8 key cache do; "
                    "a sketch needs such keys");
  add_run_options(*command, options->run);
  add_json_option(*command, options->json);
  command->footer(
      "Examples:\n"
      "  misa compare data/trace_h64_layer3.safetensors --top-k 2048 --html report.html\n"
      "  misa compare layer_*.safetensors --fp8 --indexers dsa,misa:h=16,misa-r:h=3:m=4k:sketch=2");
  command->callback([options] { run(*options); });
}

}  // namespace misa::cli
