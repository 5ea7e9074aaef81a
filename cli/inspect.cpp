// SPDX-License-Identifier: Apache-2.0
// misa inspect: what a safetensors file holds.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/App.hpp>
#include <algorithm>
#include <memory>
#include <nlohmann/json.hpp>
#include <string>

#include "commands.hpp"
#include "options.hpp"
#include "safetensors.hpp"
#include "streams.hpp"

namespace misa::cli {
namespace {

struct Options {
  std::string file;
  bool json = false;
};

void print_text(const SafetensorsReader& file) {
  std::size_t width = 0;
  for (const TensorInfo& tensor : file.tensors()) {
    width = std::max(width, one_line(tensor.name).size());
  }
  for (const TensorInfo& tensor : file.tensors()) {
    print_out("{:{}}  {:11}  {:>13} bytes  [{}]\n", one_line(tensor.name), width, tensor.dtype,
              tensor.bytes, fmt::join(tensor.shape, ", "));
  }
  for (const auto& [key, value] : file.metadata()) {
    print_out("{}: {}\n", one_line(key), one_line(value));
  }
}

void run(const Options& options) {
  const SafetensorsReader file(options.file);
  if (!options.json) {
    print_text(file);
    return;
  }
  nlohmann::ordered_json tensors = nlohmann::ordered_json::array();
  for (const TensorInfo& tensor : file.tensors()) {
    tensors.push_back({{"name", tensor.name},
                       {"dtype", tensor.dtype},
                       {"shape", tensor.shape},
                       {"bytes", tensor.bytes}});
  }
  print_json({{"file", options.file},
              {"bytes", file.file_bytes()},
              {"tensors", tensors},
              {"metadata", file.metadata()}});
}

}  // namespace

void add_inspect(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("inspect", "The tensors and the metadata of a safetensors file");
  const auto options = std::make_shared<Options>();
  command->add_option("FILE", options->file, "A safetensors file")->required();
  add_json_option(*command, options->json);
  command->footer("Example:\n  misa inspect data/trace_h64_layer3.safetensors");
  command->callback([options] { run(*options); });
}

}  // namespace misa::cli
