// SPDX-License-Identifier: Apache-2.0
// misa bench: the time of each indexer's first stage and whole step on random data.
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <unistd.h>

#include <CLI/App.hpp>
#include <algorithm>
#include <array>
#include <cerrno>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <optional>
#include <random>
#include <string>
#include <string_view>
#include <system_error>
#include <tuple>
#include <utility>
#include <vector>

#include "commands.hpp"
#include "core/recipe.hpp"
#include "cpu/kernels.hpp"
#include "indexers/backend.hpp"
#include "misa/error.hpp"
#include "options.hpp"
#include "progress.hpp"
#include "step.hpp"
#include "streams.hpp"
#include "table.hpp"
#include "timing.hpp"
#include "variant.hpp"

namespace misa::cli {
namespace {

struct Options {
  std::int64_t queries = 256;
  std::int64_t heads = 64;
  std::int64_t dim = 128;
  std::vector<std::int64_t> keys{65536};
  int top_k = 2048;
  std::string dtype = "BF16";
  int runs = 5;
  std::vector<std::string> indexers = default_variants();
  std::vector<std::string> peers;
  RunOptions run;
  std::string format = "text";
  bool json = false;
};

constexpr std::array<std::string_view, 2> kDims{"64", "128"};

constexpr std::array<std::string_view, 3> kFormats{"text", "markdown", "csv"};

constexpr std::array<std::string_view, 2> kPeers{"torch", "ggml"};

DType dtype_by_name(std::string_view name) {
  return name == "F32" ? DType::f32 : name == "BF16" ? DType::bf16 : DType::e4m3;
}

// The configuration of an indexer's first stage: it selects the candidates of the re-rank.
IndexerConfig first_stage(IndexerConfig config) {
  if (config.candidates > 0) {
    config.top_k = config.candidates;
    config.candidates = 0;
  }
  return config;
}

// Normally distributed values, encoded as `dtype`.
std::vector<std::byte> random_values(std::int64_t count, DType dtype, std::mt19937_64& random) {
  std::normal_distribution<float> normal;
  std::vector<std::byte> values(static_cast<std::size_t>(count) * size_of(dtype));
  for (std::size_t i = 0; i < static_cast<std::size_t>(count); ++i) {
    const float value = normal(random);
    if (dtype == DType::f32) {
      std::memcpy(&values[4 * i], &value, 4);
    } else if (dtype == DType::bf16) {
      const std::uint16_t bits = float_to_bf16(value);
      std::memcpy(&values[2 * i], &bits, 2);
    } else {
      values[i] = static_cast<std::byte>(float_to_e4m3(value));
    }
  }
  return values;
}

// The last queries of one context of random keys; query t sees the first keys - queries + t + 1.
class RandomStep {
 public:
  RandomStep(const Options& options, std::int64_t keys) {
    std::mt19937_64 random(1);
    std::normal_distribution<float> normal;
    const auto [queries, heads, dim] = std::tuple(options.queries, options.heads, options.dim);
    const DType dtype = dtype_by_name(options.dtype);
    q_ = random_values(queries * heads * dim, dtype, random);
    k_ = random_values(keys * dim, dtype, random);
    w_.resize(static_cast<std::size_t>(queries * heads));
    std::generate(w_.begin(), w_.end(), [&] { return normal(random); });
    if (dtype == DType::e4m3) {
      scale_.assign(static_cast<std::size_t>(keys), 1.0F);
    }
    starts_.assign(static_cast<std::size_t>(queries), 0);
    for (std::int64_t t = 0; t < queries; ++t) {
      ends_.push_back(static_cast<std::int32_t>(keys - queries + t + 1));
    }
    inputs_.q = {q_.data(), dtype, queries, heads, dim};
    inputs_.w = {w_.data(), queries, heads};
    inputs_.k = RaggedKeys{k_.data(), dtype, keys, dim, 0, scale_.empty() ? nullptr : scale_.data(),
                           starts_,   ends_};
  }
  RandomStep(const RandomStep&) = delete;
  RandomStep& operator=(const RandomStep&) = delete;

  [[nodiscard]] const StepInputs& inputs() const { return inputs_; }

 private:
  std::vector<std::byte> q_;
  std::vector<std::byte> k_;
  std::vector<float> w_;
  std::vector<float> scale_;
  std::vector<std::int32_t> starts_;
  std::vector<std::int32_t> ends_;
  StepInputs inputs_;
};

struct Result {
  Variant variant;
  std::optional<Timing> first_stage;  // routing, scoring and the selection of what is kept for the
                                      // next stage; none where that is no indexer of its own
  Timing step;
  Cost cost;  // per query
};

// Whether the first stage is timed by itself: a sketch is only ever followed by a re-rank.
bool has_first_stage(const IndexerConfig& config) {
  return config.candidates > 0 && config.sketch == 0;
}

// Selection alone: the top_k of random scores, one query per thread, offered one page at a time, as
// scoring offers them. std::nullopt for a backend without a selector.
std::optional<Contender> selection_alone(const Context& context, const Options& options,
                                         std::int64_t keys) {
  const auto tables = cpu::kernels();
  const auto table = std::find_if(tables.begin(), tables.end(), [&](const cpu::Kernels* kernels) {
    return kernels->name == context.backend();
  });
  if (table == tables.end()) {
    return std::nullopt;
  }
  // As in the CPU backends: room for twice the entries that are kept.
  using Entries = std::vector<std::uint64_t>;
  struct State {
    std::vector<float> scores;
    std::vector<std::uint32_t> positions;
    std::vector<Entries> entries;
    std::vector<Entries> scratch;
  };
  const auto state = std::make_shared<State>();
  state->scores.resize(static_cast<std::size_t>(keys + kPageSize));
  std::mt19937_64 random(1);
  std::normal_distribution<float> normal;
  std::generate(state->scores.begin(), state->scores.end(), [&] { return normal(random); });
  state->positions.resize(state->scores.size());
  std::iota(state->positions.begin(), state->positions.end(), 0U);
  const std::int64_t capacity = 2 * std::int64_t{options.top_k} + 2 * cpu::kSelectorSlack;
  const Threads& threads = context.state().threads;
  state->entries.assign(static_cast<std::size_t>(threads.count()),
                        Entries(static_cast<std::size_t>(capacity)));
  state->scratch = state->entries;
  return [state, capacity, keys, &threads, &options, &kernels = **table] {
    threads.for_each(options.queries, [&](std::int64_t, int thread) {
      const auto worker = static_cast<std::size_t>(thread);
      cpu::Selector selector{state->entries[worker].data(), 0, capacity, options.top_k, 0};
      for (std::int64_t s = 0; s < keys; s += kPageSize) {
        const auto valid = static_cast<int>(std::min<std::int64_t>(kPageSize, keys - s));
        kernels.offer(&state->scores[static_cast<std::size_t>(s)],
                      &state->positions[static_cast<std::size_t>(s)], valid, selector,
                      state->scratch[worker].data());
      }
      kernels.compact(selector, state->scratch[worker].data());
    });
  };
}

// What was measured with one number of keys.
struct Measured {
  std::int64_t keys;
  std::vector<Result> results;
  std::optional<Timing> selection;  // alone
  std::optional<double> waited;     // Timings::waited
};

// Times all variants, their first stages and selection alone, in turn.
Measured measure_all(const Context& context, const std::vector<Variant>& variants,
                     std::int64_t keys, const Options& options) {
  Measured measured{keys, {}, {}, {}};
  const RandomStep step(options, keys);
  const StepInputs& inputs = step.inputs();
  TimedSteps steps(context);
  for (const Variant& variant : variants) {
    about(variant, [&] {
      steps.add(variant.config, inputs);
      if (has_first_stage(variant.config)) {
        steps.add(first_stage(variant.config), inputs);
      }
    });
  }
  std::vector<Contender> contenders = steps.contenders();
  const std::optional<Contender> selection = selection_alone(context, options, keys);
  if (selection) {
    contenders.push_back(*selection);
  }
  Progress progress(fmt::format("{} keys", keys),
                    std::ssize(contenders) * (1 + std::int64_t{options.runs}));
  const Timings timings = measure(options.runs, contenders, [&] { progress.add(1); });
  auto timing = timings.of.begin();
  for (const Variant& variant : variants) {
    Result result{variant, {}, *timing++, mean_cost(variant.config, inputs)};
    if (has_first_stage(variant.config)) {
      result.first_stage = *timing++;
    } else if (variant.config.sketch == 0) {
      result.first_stage = result.step;
    }
    measured.results.push_back(std::move(result));
  }
  if (selection) {
    measured.selection = *timing;
  }
  measured.waited = timings.waited;
  return measured;
}

double giga_flops(const Result& result, const Options& options) {
  const double products = result.cost.dots * static_cast<double>(options.queries * options.dim);
  return 2e-9 * products / result.step.median;
}

nlohmann::ordered_json or_null(std::optional<double> value) {
  return value ? nlohmann::ordered_json(*value) : nlohmann::ordered_json();
}

nlohmann::ordered_json to_json(const Timing& timing) {
  return {{"median", timing.median},
          {"fastest", timing.fastest},
          {"slowest", timing.slowest},
          {"spread", or_null(timing.spread)}};
}

nlohmann::ordered_json to_json(const std::optional<Timing>& timing) {
  return timing ? to_json(*timing) : nlohmann::ordered_json();
}

nlohmann::ordered_json to_json(const Measured& measured, const Options& options) {
  using json = nlohmann::ordered_json;
  json indexers = json::array();
  for (const Result& result : measured.results) {
    indexers.push_back({{"name", result.variant.name},
                        {"label", result.variant.label},
                        {"settings", settings_of(result.variant.config)},
                        {"seconds_first_stage", to_json(result.first_stage)},
                        {"seconds_step", to_json(result.step)},
                        {"keys_x_heads", result.cost.dots},
                        {"gflops", giga_flops(result, options)}});
  }
  return {{"keys", measured.keys},
          {"seconds_selection", to_json(measured.selection)},
          {"waited_for_processor", or_null(measured.waited)},
          {"indexers", std::move(indexers)}};
}

nlohmann::ordered_json to_json(const std::vector<Measured>& all, const Context& context,
                               const Options& options, const std::string& warning) {
  using json = nlohmann::ordered_json;
  json contexts = json::array();
  for (const Measured& measured : all) {
    contexts.push_back(to_json(measured, options));
  }
  return {{"backend", context.backend()},
          {"threads", context.threads()},
          {"runs", options.runs},
          {"queries", options.queries},
          {"heads", options.heads},
          {"dim", options.dim},
          {"top_k", options.top_k},
          {"dtype", options.dtype},
          {"warning", warning.empty() ? json() : json(warning)},
          {"contexts", std::move(contexts)}};
}

// A row of a table without its first cells, which say what was measured.
Cells cells_of(const Result& result, const Measured& measured, const Options& options) {
  const auto millis = [](double seconds) { return fmt::format("{:.2f}", 1e3 * seconds); };
  const auto dense = std::find_if(measured.results.begin(), measured.results.end(),
                                  [](const Result& r) { return r.variant.name == "dsa"; });
  return {result.first_stage ? millis(result.first_stage->median) : std::string(kNothing),
          millis(result.step.median),
          result.step.spread ? millis(*result.step.spread) : std::string(kNothing),
          millis(result.step.fastest),
          millis(result.step.slowest),
          fmt::format("{:.1f}", 1e6 * result.step.median / static_cast<double>(options.queries)),
          fmt::format("{:.0f}", giga_flops(result, options)),
          dense == measured.results.end()
              ? std::string(kNothing)
              : fmt::format("{:.2f}×", dense->step.median / result.step.median)};
}

std::string to_text(const Measured& measured, const Options& options) {
  std::vector<Cells> rows{
      {"", "first stage", "whole step", "", "fastest", "slowest", "a query", "", "speed"},
      {"indexer", "ms", "ms", "±", "ms", "ms", "µs", "GFLOP/s", "vs DSA"}};
  for (const Result& result : measured.results) {
    Cells cells = cells_of(result, measured, options);
    cells.insert(cells.begin(), result.variant.label);
    rows.push_back(std::move(cells));
  }
  std::string text = fmt::format("\n{} keys\n\n{}", measured.keys, aligned(rows));
  if (const std::optional<Timing>& selection = measured.selection) {
    text +=
        fmt::format("\n  Selection alone, of random scores: {:.2f} ms ({:.2f} to {:.2f})\n",
                    1e3 * selection->median, 1e3 * selection->fastest, 1e3 * selection->slowest);
  }
  return text;
}

std::string to_text(const std::vector<Measured>& all, const Context& context,
                    const Options& options) {
  std::string text = fmt::format(
      "{} queries · {} heads × {} · {} · top {}\n{}, threads: {} · {}\n", options.queries,
      options.heads, options.dim, options.dtype, options.top_k, context.backend(),
      context.threads(),
      options.runs == 1 ? "one run"
                        : fmt::format("medians of {} runs, ± half the distance between the "
                                      "quartiles",
                                      options.runs));
  for (const Measured& measured : all) {
    text += to_text(measured, options);
  }
  return text;
}

// One table, for Markdown or CSV.
std::vector<Cells> table_of(const std::vector<Measured>& all, const Options& options) {
  std::vector<Cells> rows{{"indexer", "keys", "first stage, ms", "whole step, ms", "±", "fastest",
                           "slowest", "a query, µs", "GFLOP/s", "speed vs DSA"}};
  for (const Measured& measured : all) {
    for (const Result& result : measured.results) {
      Cells cells = cells_of(result, measured, options);
      const Cells about{result.variant.label, std::to_string(measured.keys)};
      cells.insert(cells.begin(), about.begin(), about.end());
      rows.push_back(std::move(cells));
    }
  }
  return rows;
}

// Becomes misa-bench-peers, which times the peers in turn with this program, a run of each a round.
[[noreturn]] void run_peers(const Options& options) {
  if (options.keys.size() > 1) {
    throw Error(
        ErrorCode::invalid_argument,
        fmt::format("--keys: expected one number with --peer, got {}", options.keys.size()));
  }
  std::vector<std::string> arguments{"misa-bench-peers", "--peers"};
  arguments.insert(arguments.end(), options.peers.begin(), options.peers.end());
  const auto add = [&](const char* name, const auto& value) {
    arguments.emplace_back(name);
    arguments.push_back(fmt::format("{}", value));
  };
  add("--misa", std::filesystem::read_symlink("/proc/self/exe").string());
  add("--queries", options.queries);
  add("--heads", options.heads);
  add("--keys", options.keys.front());
  add("--top-k", options.top_k);
  add("--indexers", fmt::format("{}", fmt::join(options.indexers, ",")));
  add("--rounds", options.runs);
  if (options.run.threads > 0) {
    add("--threads", options.run.threads);
  }
  if (options.json) {
    arguments.emplace_back("--json");
  }
  std::vector<char*> argv;
  for (std::string& argument : arguments) {
    argv.push_back(argument.data());
  }
  argv.push_back(nullptr);
  ::execvp(argv.front(), argv.data());
  throw Error(ErrorCode::io,
              fmt::format("--peer: expected the command misa-bench-peers on the path, which "
                          "`pip install .` brings: {}",
                          std::generic_category().message(errno)));
}

void run(const Options& options) {
  if (!options.peers.empty()) {
    run_peers(options);
  }
  const std::int64_t least = *std::min_element(options.keys.begin(), options.keys.end());
  if (options.queries > least) {
    throw Error(
        ErrorCode::invalid_argument,
        fmt::format("--queries: expected at most --keys = {}, got {}", least, options.queries));
  }
  const std::vector<Variant> variants = parse_variants(options.indexers, options.top_k);
  const Context context = make_context(options.run);
  std::vector<Measured> all;
  std::optional<double> waited;
  for (const std::int64_t keys : options.keys) {
    all.push_back(measure_all(context, variants, keys, options));
    waited = more_waiting(waited, all.back().waited);
  }
  warn_if_busy(waited);
  if (options.json) {
    print_json(to_json(all, context, options, busy_warning(waited)));
  } else if (options.format == "text") {
    write_out(to_text(all, context, options));
  } else {
    const std::vector<Cells> rows = table_of(all, options);
    write_out(options.format == "csv" ? csv(rows) : markdown(rows));
  }
}

}  // namespace

void add_bench(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "bench",
      "Times each indexer on random data: the first stage (routing, scoring, selection), the whole "
      "step, and selection alone");
  const auto options = std::make_shared<Options>();
  const auto size = [&](const char* name, auto& value, std::int64_t most, const char* help) {
    command->add_option(name, value, help)
        ->type_name("N")
        ->check(whole_number(1, most))
        ->capture_default_str();
  };
  constexpr std::int64_t most = std::numeric_limits<std::int32_t>::max();
  command
      ->add_option("--queries", options->queries, "Queries T, the last of the context; 2K is 2048")
      ->type_name("N")
      ->transform(size_number(1, most))
      ->capture_default_str();
  size("--heads", options->heads, kMaxHeads, "Heads H");
  command->add_option("--dim", options->dim, "Size D of a head, 64 or 128")
      ->type_name("N")
      ->check(one_of(kDims))
      ->capture_default_str();
  command
      ->add_option(
          "--keys", options->keys,
          "Keys L of the context, one or several numbers separated by commas; 64K is 65536")
      ->type_name("LIST")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->transform(size_number(1, most))
      ->capture_default_str();
  command->add_option("--top-k", options->top_k, "Positions wanted a query")
      ->type_name("N")
      ->transform(size_number(1, most))
      ->capture_default_str();
  add_dtype_option(*command, options->dtype);
  command
      ->add_option("--indexers", options->indexers,
                   fmt::format("What to time, separated by commas, in place of {}; {}",
                               fmt::join(default_variants(), ", "), kVariantHelp))
      ->type_name("LIST")
      ->delimiter(',')
      ->allow_extra_args(false);
  size("--runs", options->runs, most, "Runs that a time is the median of");
  add_run_options(*command, options->run);
  command->add_option("--format", options->format, "Of the output: text, markdown or csv")
      ->type_name("NAME")
      ->check(one_of(kFormats))
      ->capture_default_str();
  command
      ->add_option("--peer", options->peers,
                   "Other libraries, torch or ggml, to be timed in turn with the whole steps, in "
                   "BF16, by misa-bench-peers, a command of the Python package")
      ->type_name("LIST")
      ->delimiter(',')
      ->allow_extra_args(false)
      ->check(one_of(kPeers))
      ->excludes(command->get_option("--dim"))
      ->excludes(command->get_option("--dtype"))
      ->excludes(command->get_option("--backend"))
      ->excludes(command->get_option("--format"));
  add_json_option(*command, options->json);
  command->footer(
      "Examples:\n"
      "  misa bench --queries 1 --keys 64K,128K --dtype F8_E4M3 --indexers dsa,misa-r:h=3:m=4k\n"
      "  misa bench --queries 8 --keys 16K --peer torch");
  command->callback([options] { run(*options); });
}

}  // namespace misa::cli
