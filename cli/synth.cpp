// SPDX-License-Identifier: Apache-2.0
// misa synth: synthetic traces of any size. A value depends only on the seed and its place in the
// trace, so that values are written as they are generated and both layouts have the same ones.
#include <fmt/format.h>
#include <fmt/ranges.h>

#include <CLI/App.hpp>
#include <algorithm>
#include <array>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <memory>
#include <nlohmann/json.hpp>
#include <numeric>
#include <random>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "bad_input.hpp"
#include "commands.hpp"
#include "misa/cache.hpp"
#include "misa/types.hpp"
#include "options.hpp"
#include "progress.hpp"
#include "safetensors.hpp"
#include "streams.hpp"
#include "synthetic.hpp"

namespace misa::cli {
namespace {

constexpr std::array<std::string_view, 2> kLayouts{"ragged", "paged"};

struct Options {
  std::string output;
  std::string kind = "random";
  std::string layout = "ragged";
  std::string dtype = "BF16";
  std::int64_t sequences = 1;
  std::int64_t queries = 64;  // per sequence
  std::int64_t keys = 16384;  // per sequence
  std::int64_t heads = 64;
  std::int64_t dim = 128;
  std::uint64_t seed = 1;
  bool json = false;
};

void encode(std::span<const float> values, std::string_view dtype, std::vector<std::byte>& out) {
  if (dtype == "F32") {
    const auto bytes = std::as_bytes(values);
    out.assign(bytes.begin(), bytes.end());
  } else if (dtype == "BF16") {
    out.resize(values.size() * sizeof(std::uint16_t));
    for (std::size_t i = 0; i < values.size(); ++i) {
      const std::uint16_t bits = float_to_bf16(values[i]);
      std::memcpy(&out[i * sizeof bits], &bits, sizeof bits);
    }
  } else {
    out.resize(values.size());
    std::transform(values.begin(), values.end(), out.begin(),
                   [](float value) { return std::byte{float_to_e4m3(value)}; });
  }
}

// Quantises a key to e4m3; returns its scale.
float quantize_to(std::span<const float> key, std::byte* out) {
  return quantize(key, ScaleFormat::f32, {reinterpret_cast<std::uint8_t*>(out), key.size()});
}

// The output file, and what writing its tensors has in common.
class Synthesis {
 public:
  explicit Synthesis(const Options& options)
      : options_(options),
        source_(
            make_synthetic(options.kind, {options.keys, options.heads, options.dim, options.seed})),
        pages_((options.keys + kPageSize - 1) / kPageSize),
        file_(options.output, tensors(options, pages_),
              {{"source", "misa synth"}, {"kind", options.kind}}),
        progress_("synthesizing", options.sequences * (options.queries + options.keys)) {}

  void write() {
    write_queries();
    if (options_.layout == "paged") {
      write_pages();
    } else {
      write_keys();
      write_bounds();
    }
    file_.commit();
  }

  [[nodiscard]] std::uint64_t bytes() const { return file_.file_bytes(); }

 private:
  static std::vector<TensorInfo> tensors(const Options& options, std::int64_t pages) {
    const std::int64_t tokens = options.sequences * options.queries;
    const std::int64_t keys = options.sequences * options.keys;
    if (options.layout == "paged") {
      return {tensor_info("q", options.dtype,
                          {options.sequences, options.queries, options.heads, options.dim}),
              tensor_info("w", "F32", {options.sequences, options.queries, options.heads}),
              tensor_info("cache", "U8", {options.sequences * pages, kPageSize, options.dim + 4}),
              tensor_info("block_table", "I32", {options.sequences, pages}),
              tensor_info("context_lens", "I32", {options.sequences})};
    }
    std::vector<TensorInfo> list{
        tensor_info("q", options.dtype, {tokens, options.heads, options.dim}),
        tensor_info("w", "F32", {tokens, options.heads}),
        tensor_info("k", options.dtype, {keys, options.dim}), tensor_info("ks", "I32", {tokens}),
        tensor_info("ke", "I32", {tokens})};
    if (options.dtype == "F8_E4M3") {
      list.push_back(tensor_info("k_scale", "F32", {keys}));
    }
    return list;
  }

  void write_queries() {
    std::vector<float> q(static_cast<std::size_t>(options_.heads * options_.dim));
    std::vector<float> w(static_cast<std::size_t>(options_.heads));
    std::vector<std::byte> encoded;
    for (std::int64_t t = 0; t < options_.sequences * options_.queries; ++t) {
      source_->query(t, q);
      encode(q, options_.dtype, encoded);
      file_.append("q", encoded);
      source_->weights(t, w);
      file_.append("w", std::as_bytes(std::span(w)));
      progress_.add(1);
    }
  }

  void write_keys() {
    std::vector<float> key(static_cast<std::size_t>(options_.dim));
    std::vector<std::byte> encoded(key.size());
    for (std::int64_t s = 0; s < options_.sequences * options_.keys; ++s) {
      source_->key(s, key);
      if (options_.dtype == "F8_E4M3") {
        const float scale = quantize_to(key, encoded.data());
        file_.append("k_scale", std::as_bytes(std::span(&scale, 1)));
      } else {
        encode(key, options_.dtype, encoded);
      }
      file_.append("k", encoded);
      progress_.add(1);
    }
  }

  void write_bounds() {
    for (std::int64_t b = 0; b < options_.sequences; ++b) {
      const std::int64_t start = b * options_.keys;
      for (std::int64_t i = 0; i < options_.queries; ++i) {
        const std::int64_t seen =
            std::max<std::int64_t>(0, options_.keys - options_.queries + 1 + i);
        append_number("ks", start);
        append_number("ke", start + seen);
      }
    }
  }

  // Physical pages are shuffled, as in a server after some use.
  void write_pages() {
    const std::int64_t count = options_.sequences * pages_;
    std::vector<std::int32_t> logical(static_cast<std::size_t>(count));  // of each physical page
    std::iota(logical.begin(), logical.end(), 0);
    auto random = synthetic_numbers(options_.seed, SyntheticUse::pages, 0);
    std::shuffle(logical.begin(), logical.end(), random);
    std::vector<std::int32_t> table(logical.size());
    std::vector<std::byte> page;
    std::vector<float> key(static_cast<std::size_t>(options_.dim));
    for (std::int64_t physical = 0; physical < count; ++physical) {
      table[logical[physical]] = static_cast<std::int32_t>(physical);
      const std::int64_t sequence = logical[physical] / pages_;
      const std::int64_t first = logical[physical] % pages_ * kPageSize;
      const std::int64_t filled = std::min<std::int64_t>(kPageSize, options_.keys - first);
      page.assign(static_cast<std::size_t>(cache_bytes(1, options_.dim)), std::byte{0});
      for (std::int64_t i = 0; i < filled; ++i) {
        source_->key(sequence * options_.keys + first + i, key);
        const float scale = quantize_to(key, &page[i * options_.dim]);
        std::memcpy(&page[kPageSize * options_.dim + 4 * i], &scale, sizeof scale);
      }
      file_.append("cache", page);
      progress_.add(filled);
    }
    file_.append("block_table", std::as_bytes(std::span(table)));
    for (std::int64_t b = 0; b < options_.sequences; ++b) {
      append_number("context_lens", options_.keys);
    }
  }

  void append_number(std::string_view name, std::int64_t number) {
    const auto value = static_cast<std::int32_t>(number);
    file_.append(name, std::as_bytes(std::span(&value, 1)));
  }

  const Options& options_;
  std::unique_ptr<const Synthetic> source_;
  std::int64_t pages_;  // per sequence
  SafetensorsWriter file_;
  Progress progress_;
};

void run(const Options& options) {
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();  // ks and ke are I32
  require(options.keys <= kMost / options.sequences,
          "--keys: expected {} at most in {} sequences, got {}", kMost / options.sequences,
          options.sequences, options.keys);
  require(options.queries <= kMost / options.sequences,
          "--queries: expected {} at most in {} sequences, got {}", kMost / options.sequences,
          options.sequences, options.queries);
  require(options.dim == 64 || options.dim == 128, "--dim: expected 64 or 128, got {}",
          options.dim);
  require(options.layout == "ragged" || options.dtype == "F8_E4M3",
          "--dtype: expected F8_E4M3 with --layout paged, got {}", options.dtype);
  std::uint64_t bytes = 0;
  {
    Synthesis synthesis(options);
    synthesis.write();
    bytes = synthesis.bytes();
  }
  if (options.json) {
    print_json({{"out", options.output}, {"out_bytes", bytes}});
  } else {
    print_out("{}: {} bytes\n", one_line(options.output), bytes);
  }
}

constexpr const char* kFooter =
    R"(Each of B sequences has L keys, and its last T positions ask: query i of a sequence sees its first
L - T + 1 + i keys. Memory does not grow with the file. The same options give the same file, and
both layouts hold the same keys.

Kinds:
  random        normal entries in q, w and k
  structured    needles (a key in 64, of 8 kinds) among keys that share a direction. Half of the
                heads look along it: their energy is high, but nearly the same for every key. The
                others are silent, but for an eighth of them, others for each query, which fire on
                needles of one kind. Routing by energy (misa) misses the needles, by nonlinearity
                (misa-r) finds them.
  concentrated  8 heads a query, others for each, weigh 32 times as much as the rest, in pairs with
                opposite queries, of which no linear row says anything. misa routes all 8; misa-r
                routes fewer and loses what the others say.
  passages      passages of 256 keys on a topic each, of which a query asks for one. A quarter of
                the heads see whether a passage is on the topic; the others, in pairs with opposite
                queries, say which of its keys count, and take all of them to say so. A filter of
                blocks, then all heads on what it keeps (hisa), wins among indexers without a
                re-rank; a few heads lose.

Layouts:
  ragged   q [B*T,H,D], w [B*T,H], k [B*L,D], ks and ke [B*T], with F8_E4M3 also k_scale [B*L]
  paged    q [B,T,H,D], w [B,T,H], cache [pages,64,D+4] in shuffled pages, block_table, context_lens

Examples:
  misa synth -o trace.safetensors --kind structured --queries 256 --keys 64K
  misa synth -o decode.safetensors --layout paged --dtype F8_E4M3 --sequences 32 --queries 1)";

}  // namespace

void add_synth(CLI::App& app) {
  CLI::App* command =
      app.add_subcommand("synth", "Make up a trace of any size, random or with needles to find");
  const auto options = std::make_shared<Options>();
  constexpr std::int64_t kMost = std::numeric_limits<std::int32_t>::max();
  const auto number = [&](const char* name, std::int64_t& value, std::int64_t least,
                          std::int64_t most, const char* help) {
    command->add_option(name, value, help)
        ->type_name("N")
        ->check(whole_number(least, most))
        ->capture_default_str();
  };
  const auto size = [&](const char* name, std::int64_t& value, const char* help) {
    command->add_option(name, value, help)
        ->type_name("N")
        ->transform(size_number(0, kMost))
        ->capture_default_str();
  };
  const auto word = [&](const char* name, std::string& value,
                        std::span<const std::string_view> words, const char* help) {
    command->add_option(name, value, fmt::format("{}: {}", help, fmt::join(words, ", ")))
        ->type_name("NAME")
        ->check(one_of(words))
        ->capture_default_str();
  };
  command->add_option("-o,--output", options->output, "The trace, a safetensors file")
      ->type_name("OUT")
      ->required();
  word("--kind", options->kind, kSyntheticKinds, "What the values are like");
  word("--layout", options->layout, kLayouts, "How keys are stored");
  add_dtype_option(*command, options->dtype);
  number("--sequences", options->sequences, 1, kMost, "Sequences B");
  size("--queries", options->queries, "Queries T of each sequence; 2K is 2048");
  size("--keys", options->keys, "Keys L of each sequence; 64K is 65536");
  number("--heads", options->heads, 1, kMaxHeads, "Indexer heads H");
  number("--dim", options->dim, 64, 128, "Size D of a head, 64 or 128");
  command->add_option("--seed", options->seed, "Another seed, other values")
      ->type_name("N")
      ->check(whole_number(0, std::numeric_limits<std::int64_t>::max()))
      ->capture_default_str();
  add_json_option(*command, options->json);
  command->footer(kFooter);
  command->callback([options] { run(*options); });
}

}  // namespace misa::cli
