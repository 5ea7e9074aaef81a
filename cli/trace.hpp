// SPDX-License-Identifier: Apache-2.0
// The input of the indexers, read from a file.
#pragma once

#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "safetensors.hpp"
#include "step.hpp"

namespace misa::cli {

// A safetensors file of queries, weights and keys, contiguous or paged, checked in full: what
// `inputs` returns is valid input of the library. docs/formats.md says what a file holds.
class Trace {
 public:
  // Throws Error, which names the file and the tensor, what was expected and what was found.
  explicit Trace(const std::string& path);
  Trace(const Trace&) = delete;
  Trace& operator=(const Trace&) = delete;

  [[nodiscard]] const std::string& path() const { return path_; }
  // What the file's metadata say under "layer"; without them the number after "layer" in its name,
  // e.g. 3 for trace_layer3.safetensors or layer_3.safetensors; else the name without its suffix.
  [[nodiscard]] std::string layer() const;
  [[nodiscard]] const Metadata& metadata() const { return metadata_; }

  [[nodiscard]] const StepInputs& inputs() const { return inputs_; }

  // Rounds queries and keys that are not e4m3 to it, as models with an FP8 key cache do: each key
  // with its own scale, each head of a query with a scale that is folded into its weight.
  void round_to_e4m3();

  // Whether the file has the model's own attention for query t, and that attention over the
  // positions that t sees.
  [[nodiscard]] bool has_attention(std::int64_t t) const;
  [[nodiscard]] std::vector<float> attention(std::int64_t t) const;

 private:
  const Buffer& read(const SafetensorsReader& file, const TensorInfo& tensor);
  // `rows` names the dimensions of q and w that are flattened to T: "T" or "B, next_n".
  void read_queries(const SafetensorsReader& file, std::string_view rows);
  void read_ragged(const SafetensorsReader& file);
  void read_paged(const SafetensorsReader& file);

  std::string path_;
  Metadata metadata_;
  std::vector<Buffer> data_;
  std::vector<std::uint8_t> rounded_q_;  // of round_to_e4m3
  std::vector<float> rounded_w_;
  std::vector<std::uint8_t> rounded_k_;
  std::vector<float> scales_;
  std::vector<std::int32_t> starts_;  // ks and ke if the file does not have them
  std::vector<std::int32_t> ends_;
  StepInputs inputs_;
  std::span<const std::uint16_t> attention_;  // [32, L] bf16; empty if there is none
};

}  // namespace misa::cli
