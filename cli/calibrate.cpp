// SPDX-License-Identifier: Apache-2.0
// misa calibrate: one list of heads per layer, for `misa select --router static`.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/App.hpp>
#include <array>
#include <cstdint>
#include <memory>
#include <nlohmann/json.hpp>
#include <optional>
#include <span>
#include <string>
#include <string_view>
#include <variant>
#include <vector>

#include "api/validate.hpp"
#include "commands.hpp"
#include "indexers/reference.hpp"
#include "misa/error.hpp"
#include "options.hpp"
#include "output_file.hpp"
#include "progress.hpp"
#include "select/reference.hpp"
#include "streams.hpp"
#include "trace.hpp"

namespace misa::cli {
namespace {

constexpr std::array<std::string_view, 2> kRouters{"dispersion", "nonlinearity"};

struct Options {
  std::vector<std::string> files;
  std::string output;
  std::string router = "dispersion";
  int heads = 8;
  bool json = false;
};

// The result for one trace, which is one layer.
struct Layer {
  std::string file;
  std::string layer;
  std::vector<double> values;       // [H] mean of the router's value over the rows that see a key
  std::vector<std::int64_t> heads;  // the h heads of largest mean, ascending
};

Layer calibrate(const std::string& file, const IndexerConfig& config) {
  const Trace trace(file);
  const StepInputs& inputs = trace.inputs();
  validate(config, inputs.shape());
  const Queries q = validated(inputs.q);
  const Problem problem{
      config,
      q,
      validated(inputs.w, q),
      std::visit([&](const auto& k) { return source_of(validated(k, q)); }, inputs.k),
      {}};
  Layer layer{file, trace.layer(), std::vector<double>(static_cast<std::size_t>(q.heads)), {}};
  Progress progress(one_line(file), q.tokens);
  double rows = 0;
  for (std::int64_t t = 0; t < q.tokens; ++t) {
    if (problem.visible(t) > 0) {
      const auto values = reference::head_values(reference::load_row(problem, t), config);
      for (std::size_t j = 0; j < values.size(); ++j) {
        layer.values[j] += values[j];
      }
      ++rows;
    }
    progress.add(1);
  }
  if (rows == 0) {
    throw Error(ErrorCode::invalid_argument,
                fmt::format("{}: expected a query that sees a key, got none", file));
  }
  for (double& value : layer.values) {
    value /= rows;
  }
  layer.heads = reference::top_k(layer.values, config.heads);
  return layer;
}

nlohmann::ordered_json to_json(const std::vector<Layer>& layers, const Options& options) {
  nlohmann::ordered_json lists = nlohmann::ordered_json::array();
  for (const Layer& layer : layers) {
    lists.push_back({{"layer", layer.layer},
                     {"file", layer.file},
                     {"static_heads", layer.heads},
                     {"mean_values", layer.values}});
  }
  return {{"router", options.router}, {"heads", options.heads}, {"layers", std::move(lists)}};
}

void run(const Options& options) {
  IndexerConfig config = IndexerConfig::dsa();
  config.router = router_by_name(options.router);
  config.heads = options.heads;
  std::optional<OutputFile> file;  // opened first, so that a wrong path fails before the work
  if (!options.output.empty()) {
    require_no_overwrite(options.output, options.files);
    file.emplace(options.output);
  }
  std::vector<Layer> layers;
  for (const std::string& trace : options.files) {
    layers.push_back(calibrate(trace, config));
  }
  const nlohmann::ordered_json json = to_json(layers, options);
  if (file) {
    const std::string text =
        json.dump(2, ' ', false, nlohmann::ordered_json::error_handler_t::replace) + '\n';
    file->write_at(0, std::as_bytes(std::span(text)));
    file->commit();
  }
  if (options.json) {
    print_json(json);
    return;
  }
  for (const Layer& layer : layers) {
    print_out("{}: --indexer misa --router static --heads {} --static-heads {}\n",
              one_line(layer.file), options.heads, fmt::join(layer.heads, ","));
  }
}

}  // namespace

void add_calibrate(CLI::App& app) {
  CLI::App* command = app.add_subcommand(
      "calibrate",
      "A static list of heads for each layer: those of largest mean value under a router, over the "
      "queries of a trace. Computed by the reference");
  const auto options = std::make_shared<Options>();
  command->add_option("TRACE", options->files, "Traces: safetensors files, one a layer")
      ->required();
  command
      ->add_option("-o,--output", options->output,
                   "Writes the lists, and the mean of every head, as JSON")
      ->type_name("FILE");
  command
      ->add_option("--router", options->router, "What a head is worth: dispersion or nonlinearity")
      ->type_name("NAME")
      ->check(one_of(kRouters))
      ->capture_default_str();
  command->add_option("--heads", options->heads, "Heads h of a list")
      ->type_name("N")
      ->check(whole_number(1, kMaxHeads))
      ->capture_default_str();
  add_json_option(*command, options->json);
  command->footer("Example:\n  misa calibrate data/trace_h64_layer3.safetensors --heads 8");
  command->callback([options] { run(*options); });
}

}  // namespace misa::cli
