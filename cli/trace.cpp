// SPDX-License-Identifier: Apache-2.0
#include "trace.hpp"

#include <fmt/format.h>
#include <fmt/ranges.h>

#include <algorithm>
#include <filesystem>
#include <functional>
#include <limits>
#include <optional>
#include <span>
#include <utility>

#include "bad_input.hpp"
#include "misa/cache.hpp"
#include "misa/error.hpp"

namespace misa::cli {
namespace {

// Rows of attn_last32.
constexpr std::int64_t kAttentionRows = 32;

using Names = std::vector<std::string_view>;

// Checks that the required tensors are present and that those of the other layout are absent, as
// both together would be ambiguous. Any other tensor is ignored.
void check_names(const SafetensorsReader& file, const Names& required, const Names& other,
                 std::string_view layout) {
  for (const std::string_view name : other) {
    if (const TensorInfo* tensor = file.find(name)) {
      fail("{}: expected none {} cache, got {}", name, layout,
           describe(tensor->dtype, tensor->shape));
    }
  }
  for (const std::string_view name : required) {
    require(file.find(name) != nullptr, "{}: expected a tensor of this name, got none", name);
  }
}

// The element type of queries or keys.
DType value_type(const TensorInfo& tensor) {
  if (tensor.dtype == "F32") {
    return DType::f32;
  }
  if (tensor.dtype == "BF16") {
    return DType::bf16;
  }
  require(tensor.dtype == "F8_E4M3", "{}: expected F32, BF16 or F8_E4M3, got {}{}", tensor.name,
          describe(tensor.dtype, tensor.shape),
          tensor.dtype == "F16" ? "; F32 holds its values exactly" : "");
  return DType::e4m3;
}

// The end of a row that sees nothing.
constexpr std::int64_t kEmpty = 0;

// A size that may have any value.
constexpr std::int64_t kAny = -1;

// `symbols` names the sizes, as in "[T, H]".
void check_shape(const TensorInfo& tensor, std::string_view symbols,
                 const std::vector<std::int64_t>& sizes) {
  const bool fits =
      std::equal(sizes.begin(), sizes.end(), tensor.shape.begin(), tensor.shape.end(),
                 [](std::int64_t want, std::int64_t got) { return want == kAny || want == got; });
  if (!fits) {
    std::vector<std::string> expected;
    for (const std::int64_t size : sizes) {
      expected.push_back(size == kAny ? "any" : fmt::to_string(size));
    }
    fail("{}: expected {} = [{}], got {}", tensor.name, symbols, fmt::join(expected, ", "),
         describe(tensor.dtype, tensor.shape));
  }
}

void check_tensor(const TensorInfo& tensor, std::string_view dtype, std::string_view symbols,
                  const std::vector<std::int64_t>& sizes) {
  require(tensor.dtype == dtype, "{}: expected {} {}, got {}", tensor.name, dtype, symbols,
          describe(tensor.dtype, tensor.shape));
  check_shape(tensor, symbols, sizes);
}

template <class T>
std::span<const T> elements(const Buffer& data) {
  return {reinterpret_cast<const T*>(data.data()), data.size() / sizeof(T)};
}

void check_range(std::string_view name, std::span<const std::int32_t> values, std::int64_t most) {
  for (std::size_t t = 0; t < values.size(); ++t) {
    require(values[t] >= 0 && values[t] <= most, "{}[{}]: expected 0 to L = {}, got {}", name, t,
            most, values[t]);
  }
}

// Rounds rows [rows, dim] to e4m3 and returns the scale of each.
std::vector<float> round_rows(const void* data, DType dtype, std::int64_t rows, std::int64_t dim,
                              std::vector<std::uint8_t>& out) {
  out.resize(static_cast<std::size_t>(rows * dim));
  std::vector<float> scales;
  std::vector<float> row(static_cast<std::size_t>(dim));
  for (std::int64_t r = 0; r < rows; ++r) {
    for (std::int64_t d = 0; d < dim; ++d) {
      const std::int64_t i = r * dim + d;
      row[d] = dtype == DType::f32 ? static_cast<const float*>(data)[i]
                                   : bf16_to_float(static_cast<const std::uint16_t*>(data)[i]);
    }
    const std::span<std::uint8_t> to(out.data() + r * dim, row.size());
    scales.push_back(quantize(row, ScaleFormat::f32, to));
  }
  return scales;
}

}  // namespace

Trace::Trace(const std::string& path) : path_(path) {
  const SafetensorsReader file(path);
  metadata_ = file.metadata();
  try {
    if (file.find("cache") != nullptr) {
      read_paged(file);
    } else {
      read_ragged(file);
    }
  } catch (const Error& error) {
    throw Error(error.code(), fmt::format("{}: {}", path, error.what()));
  }
}

const Buffer& Trace::read(const SafetensorsReader& file, const TensorInfo& tensor) {
  return data_.emplace_back(file.read(tensor));
}

void Trace::read_queries(const SafetensorsReader& file, std::string_view rows) {
  const TensorInfo& q = *file.find("q");
  const TensorInfo& w = *file.find("w");
  const auto dimensions = static_cast<std::size_t>(std::count(rows.begin(), rows.end(), ',')) + 3;
  inputs_.q.dtype = value_type(q);
  check_shape(q, fmt::format("[{}, H, D]", rows), std::vector(dimensions, kAny));
  const std::int64_t heads = q.shape[dimensions - 2];
  const std::int64_t dim = q.shape[dimensions - 1];
  require(heads >= 1 && heads <= kMaxHeads, "q: expected H = 1 to {}, got {}", kMaxHeads, heads);
  require(dim == 64 || dim == 128, "q: expected D = 64 or 128, got {}", dim);
  check_tensor(w, "F32", fmt::format("[{}, H]", rows), {q.shape.begin(), q.shape.end() - 1});
  const auto values = static_cast<std::int64_t>(q.bytes / size_of(inputs_.q.dtype));
  inputs_.q.tokens = values / (heads * dim);
  inputs_.q.heads = heads;
  inputs_.q.dim = dim;
  inputs_.q.data = read(file, q).data();
  inputs_.w = {elements<float>(read(file, w)).data(), inputs_.q.tokens, heads};
}

void Trace::read_ragged(const SafetensorsReader& file) {
  check_names(file, {"q", "w", "k"}, {"block_table", "context_lens"}, "without");
  read_queries(file, "T");
  const std::int64_t tokens = inputs_.q.tokens;

  const TensorInfo& k = *file.find("k");
  RaggedKeys keys;
  keys.dtype = value_type(k);
  keys.dim = inputs_.q.dim;
  check_shape(k, "[L, D]", {kAny, keys.dim});
  keys.tokens = k.shape[0];
  constexpr std::int64_t kMaxKeys = std::numeric_limits<std::int32_t>::max();
  require(keys.tokens <= kMaxKeys, "k: expected L = {} at most, got {}", kMaxKeys, keys.tokens);
  keys.data = read(file, k).data();

  const TensorInfo* scale = file.find("k_scale");
  if (keys.dtype == DType::e4m3) {
    require(scale != nullptr, "k_scale: expected F32 [L] with F8_E4M3 keys, got none");
    check_tensor(*scale, "F32", "[L]", {keys.tokens});
    keys.scale = elements<float>(read(file, *scale)).data();
  } else {
    require(scale == nullptr, "k_scale: expected none with {} keys, got a tensor", k.dtype);
  }

  if (const TensorInfo* starts = file.find("ks")) {
    check_tensor(*starts, "I32", "[T]", {tokens});
    keys.starts = elements<std::int32_t>(read(file, *starts));
    check_range("ks", keys.starts, keys.tokens);
  } else {
    starts_.assign(static_cast<std::size_t>(tokens), 0);
    keys.starts = starts_;
  }
  if (const TensorInfo* ends = file.find("ke")) {
    check_tensor(*ends, "I32", "[T]", {tokens});
    keys.ends = elements<std::int32_t>(read(file, *ends));
    check_range("ke", keys.ends, keys.tokens);
  } else {
    for (std::int64_t t = 0; t < tokens; ++t) {
      ends_.push_back(static_cast<std::int32_t>(std::max(keys.tokens - tokens + t + 1, kEmpty)));
    }
    keys.ends = ends_;
  }
  inputs_.k = keys;

  if (const TensorInfo* attention = file.find("attn_last32")) {
    check_tensor(*attention, "BF16", "[32, L]", {kAttentionRows, keys.tokens});
    require(tokens >= kAttentionRows, "attn_last32: expected T = {} or more, got {}",
            kAttentionRows, tokens);
    attention_ = elements<std::uint16_t>(read(file, *attention));
  }
}

void Trace::read_paged(const SafetensorsReader& file) {
  check_names(file, {"q", "w", "cache", "block_table", "context_lens"},
              {"k", "k_scale", "ks", "ke", "attn_last32"}, "beside");
  read_queries(file, "B, next_n");
  const TensorInfo& q = *file.find("q");
  const TensorInfo& cache = *file.find("cache");
  const TensorInfo& table = *file.find("block_table");
  const TensorInfo& lens = *file.find("context_lens");
  const std::int64_t batch = q.shape[0];

  PagedKeys keys;
  keys.next_n = q.shape[1];
  require(keys.next_n >= 1, "q: expected next_n = 1 or more, got {}", keys.next_n);
  keys.cache.dim = inputs_.q.dim;
  check_tensor(cache, "U8", "[pages, page_size, D + 4]", {kAny, kAny, keys.cache.dim + 4});
  keys.cache.pages = cache.shape[0];
  keys.cache.page_size = cache.shape[1];
  require(keys.cache.page_size == 32 || keys.cache.page_size == 64 || keys.cache.page_size == 128,
          "cache: expected a page size of 32, 64 or 128, got {}", keys.cache.page_size);
  keys.cache.data = elements<std::uint8_t>(read(file, cache)).data();
  check_tensor(table, "I32", "[B, max_pages]", {batch, kAny});
  keys.max_pages = table.shape[1];
  const std::span<const std::int32_t> pages = elements<std::int32_t>(read(file, table));
  keys.block_table = pages.data();
  check_tensor(lens, "I32", "[B]", {batch});
  keys.context_lens = elements<std::int32_t>(read(file, lens));
  for (std::int64_t b = 0; b < batch; ++b) {
    const std::int64_t length = keys.context_lens[b];
    const std::int64_t page_size = keys.cache.page_size;
    const std::int64_t used = (length + page_size - 1) / page_size;
    require(used <= keys.max_pages,
            "context_lens[{}]: expected {} at most (max_pages * {}), got {}", b,
            keys.max_pages * page_size, page_size, length);
    for (std::int64_t i = 0; i < used; ++i) {
      const std::int32_t page = pages[b * keys.max_pages + i];
      require(page >= 0 && page < keys.cache.pages,
              "block_table[{}, {}]: expected 0 to {} (the cache's pages), got {}", b, i,
              keys.cache.pages - 1, page);
    }
  }
  inputs_.k = keys;
}

void Trace::round_to_e4m3() {
  Queries& q = inputs_.q;
  if (q.dtype != DType::e4m3) {
    const std::vector<float> scales =
        round_rows(q.data, q.dtype, q.tokens * q.heads, q.dim, rounded_q_);
    rounded_w_.assign(inputs_.w.data, inputs_.w.data + scales.size());
    std::transform(rounded_w_.begin(), rounded_w_.end(), scales.begin(), rounded_w_.begin(),
                   std::multiplies<>());
    q.data = rounded_q_.data();
    q.dtype = DType::e4m3;
    inputs_.w.data = rounded_w_.data();
  }
  auto* const k = std::get_if<RaggedKeys>(&inputs_.k);  // pages hold e4m3
  if (k != nullptr && k->dtype != DType::e4m3) {
    scales_ = round_rows(k->data, k->dtype, k->tokens, k->dim, rounded_k_);
    k->data = rounded_k_.data();
    k->dtype = DType::e4m3;
    k->scale = scales_.data();
  }
}

std::string Trace::layer() const {
  constexpr std::string_view kWord = "layer";
  if (const auto given = metadata_.find(std::string(kWord)); given != metadata_.end()) {
    return given->second;
  }
  std::string name = std::filesystem::path(path_).stem();
  const std::size_t word = name.rfind(kWord);
  if (word == std::string::npos) {
    return name;
  }
  const std::size_t after = word + kWord.size();
  const bool parted =
      after < name.size() && std::string_view("_-.").find(name[after]) != std::string_view::npos;
  const std::size_t begin = after + (parted ? 1 : 0);
  const std::size_t end = std::min(name.find_first_not_of("0123456789", begin), name.size());
  return end > begin ? name.substr(begin, end - begin) : name;
}

bool Trace::has_attention(std::int64_t t) const {
  return !attention_.empty() && t >= inputs_.q.tokens - kAttentionRows;
}

std::vector<float> Trace::attention(std::int64_t t) const {
  const auto& keys = std::get<RaggedKeys>(inputs_.k);
  const std::int64_t row = t - (inputs_.q.tokens - kAttentionRows);
  std::vector<float> values;
  for (std::int64_t s = keys.starts[t]; s < keys.ends[t]; ++s) {
    values.push_back(bf16_to_float(attention_[row * keys.tokens + s]));
  }
  return values;
}

}  // namespace misa::cli
