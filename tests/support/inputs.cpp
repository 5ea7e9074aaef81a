// SPDX-License-Identifier: Apache-2.0
#include "support/inputs.hpp"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <numeric>
#include <random>

#include "core/problem.hpp"
#include "misa/cache.hpp"

namespace misa::test {
namespace {

constexpr std::byte kNaNByte{0xff};  // 0xff… is a NaN in every dtype
constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

class Source {
 public:
  Source(Values values, std::uint64_t seed) : values_(values), random_(seed) {}

  float next() {
    switch (values_) {
      case Values::normal:
      case Values::repeated: return std::normal_distribution<float>()(random_);
      case Values::integers:
        return static_cast<float>(std::uniform_int_distribution<int>(-2, 2)(random_));
      case Values::zero: break;
    }
    return 0;
  }

 private:
  Values values_;
  std::mt19937_64 random_;
};

// Encodes one key; returns its scale. Integers are not scaled, so that sums stay exact.
float encode_key(std::span<const float> key, const PackSpec& spec, std::byte* out) {
  float scale = 1;
  if (spec.k_dtype == DType::e4m3 && spec.values != Values::integers) {
    float largest = 1e-4F;
    for (const float value : key) {
      largest = std::max(largest, std::abs(value));
    }
    scale = largest / kE4m3Max;
  }
  for (std::size_t d = 0; d < key.size(); ++d) {
    encode(key[d] / scale, spec.k_dtype, out, static_cast<std::int64_t>(d));
  }
  return scale;
}

}  // namespace

void encode(float value, DType dtype, std::byte* row, std::int64_t i) {
  switch (dtype) {
    case DType::f32: std::memcpy(row + 4 * i, &value, 4); break;
    case DType::bf16: {
      const std::uint16_t bits = float_to_bf16(value);
      std::memcpy(row + 2 * i, &bits, 2);
      break;
    }
    case DType::e4m3: row[i] = std::byte{float_to_e4m3(value)}; break;
  }
}

std::int64_t Pack::tokens() const {
  std::int64_t total = 0;
  for (const SequenceSpec& sequence : spec.sequences) {
    total += sequence.queries;
  }
  return total;
}

void Pack::set_q(std::int64_t t, std::int64_t j, std::int64_t d, float value) {
  encode(value, spec.q_dtype, q.data(), (t * spec.heads + j) * spec.dim + d);
}

void Pack::set_k(std::int64_t sequence, std::int64_t position, std::int64_t d, float value) {
  encode(value, spec.k_dtype, k[sequence].data(), position * spec.dim + d);
}

Pack make_pack(const PackSpec& spec) {
  Pack pack;
  pack.spec = spec;
  Source source(spec.values, spec.seed);
  const std::int64_t rows = pack.tokens() * spec.heads;
  pack.q.resize(static_cast<std::size_t>(rows * spec.dim) * size_of(spec.q_dtype));
  for (std::int64_t i = 0; i < rows * spec.dim; ++i) {
    encode(source.next(), spec.q_dtype, pack.q.data(), i);
  }
  for (std::int64_t i = 0; i < rows; ++i) {
    pack.w.push_back(source.next());
  }
  std::vector<float> key(static_cast<std::size_t>(spec.dim));
  const std::size_t key_bytes = key.size() * size_of(spec.k_dtype);
  for (const SequenceSpec& sequence : spec.sequences) {
    auto& bytes = pack.k.emplace_back(static_cast<std::size_t>(sequence.keys) * key_bytes);
    auto& scale = pack.scale.emplace_back();
    for (std::int64_t position = 0; position < sequence.keys; ++position) {
      if (spec.values != Values::repeated || position == 0) {
        std::generate(key.begin(), key.end(), [&] { return source.next(); });
      }
      scale.push_back(
          encode_key(key, spec,
                     bytes.data() + position * std::ssize(key) *
                                        static_cast<std::int64_t>(size_of(spec.k_dtype))));
    }
  }
  return pack;
}

Pack cut(const Pack& pack, Rows rows) {
  const PackSpec& spec = pack.spec;
  const SequenceSpec& sequence = spec.sequences.front();
  const std::int64_t after = sequence.queries - rows.first - rows.count;
  const std::int64_t keys = std::max<std::int64_t>(0, sequence.keys - after);
  const auto q_row = spec.heads * spec.dim * static_cast<std::int64_t>(size_of(spec.q_dtype));
  const auto k_row = spec.dim * static_cast<std::int64_t>(size_of(spec.k_dtype));
  Pack part;
  part.spec = spec;
  part.spec.sequences = {{keys, rows.count}};
  part.q.assign(pack.q.begin() + rows.first * q_row,
                pack.q.begin() + (rows.first + rows.count) * q_row);
  part.w.assign(pack.w.begin() + rows.first * spec.heads,
                pack.w.begin() + (rows.first + rows.count) * spec.heads);
  part.k.emplace_back(pack.k[0].begin(), pack.k[0].begin() + keys * k_row);
  part.scale.emplace_back(pack.scale[0].begin(), pack.scale[0].begin() + keys);
  return part;
}

Pack concat(const std::vector<Pack>& packs) {
  Pack whole = packs.front();
  for (std::size_t i = 1; i < packs.size(); ++i) {
    const Pack& next = packs[i];
    const auto append = [](auto& to, const auto& from) {
      to.insert(to.end(), from.begin(), from.end());
    };
    append(whole.spec.sequences, next.spec.sequences);
    append(whole.q, next.q);
    append(whole.w, next.w);
    append(whole.k, next.k);
    append(whole.scale, next.scale);
  }
  return whole;
}

QueryTensors::QueryTensors(const Pack& pack, std::int64_t padding) {
  const PackSpec& spec = pack.spec;
  const std::int64_t tokens = pack.tokens();
  const std::int64_t head_stride = spec.dim + padding;
  const std::int64_t token_stride = spec.heads * head_stride + padding;
  const auto element_size = static_cast<std::int64_t>(size_of(spec.q_dtype));
  q_.assign(static_cast<std::size_t>(tokens * token_stride * element_size), kNaNByte);
  w_.assign(static_cast<std::size_t>(tokens * (spec.heads + padding)), kNaN);
  for (std::int64_t t = 0; t < tokens; ++t) {
    for (std::int64_t j = 0; j < spec.heads; ++j) {
      std::copy_n(pack.q.data() + (t * spec.heads + j) * spec.dim * element_size,
                  spec.dim * element_size,
                  q_.data() + (t * token_stride + j * head_stride) * element_size);
      w_[t * (spec.heads + padding) + j] = pack.w[t * spec.heads + j];
    }
  }
  queries_ = {q_.data(), spec.q_dtype, tokens, spec.heads, spec.dim, token_stride, head_stride};
  weights_ = {w_.data(), tokens, spec.heads, spec.heads + padding};
}

Queries QueryTensors::q(Rows rows) const {
  Queries view = queries_;
  view.data = static_cast<const std::byte*>(view.data) +
              rows.first * view.token_stride * static_cast<std::int64_t>(size_of(view.dtype));
  view.tokens = rows.count;
  return view;
}

Weights QueryTensors::w(Rows rows) const {
  Weights view = weights_;
  view.data += rows.first * view.token_stride;
  view.tokens = rows.count;
  return view;
}

RaggedInputs::RaggedInputs(const Pack& pack, std::int64_t padding) : QueryTensors(pack, padding) {
  const PackSpec& spec = pack.spec;
  const std::int64_t stride = spec.dim + padding;
  const auto element_size = static_cast<std::int64_t>(size_of(spec.k_dtype));
  std::int64_t tokens = 0;
  for (const SequenceSpec& sequence : spec.sequences) {
    tokens += sequence.keys + padding;
  }
  k_.assign(static_cast<std::size_t>(tokens * stride * element_size), kNaNByte);
  scale_.assign(static_cast<std::size_t>(tokens), kNaN);
  std::int64_t start = 0;
  for (std::size_t i = 0; i < spec.sequences.size(); ++i) {
    const SequenceSpec& sequence = spec.sequences[i];
    for (std::int64_t position = 0; position < sequence.keys; ++position) {
      std::copy_n(pack.k[i].data() + position * spec.dim * element_size, spec.dim * element_size,
                  k_.data() + (start + position) * stride * element_size);
      scale_[start + position] = pack.scale[i][position];
    }
    for (std::int64_t query = 0; query < sequence.queries; ++query) {
      const std::int64_t n = sequence.keys - sequence.queries + 1 + query;
      starts_.push_back(static_cast<std::int32_t>(start));
      ends_.push_back(static_cast<std::int32_t>(std::max<std::int64_t>(0, start + n)));
    }
    start += sequence.keys + padding;
  }
  keys_.data = k_.data();
  keys_.dtype = spec.k_dtype;
  keys_.tokens = tokens;
  keys_.dim = spec.dim;
  keys_.token_stride = stride;
  keys_.scale = spec.k_dtype == DType::e4m3 ? scale_.data() : nullptr;
}

RaggedKeys RaggedInputs::k(Rows rows) const {
  RaggedKeys view = keys_;
  const auto first = static_cast<std::size_t>(rows.first);
  const auto count = static_cast<std::size_t>(rows.count);
  view.starts = std::span(starts_).subspan(first, count);
  view.ends = std::span(ends_).subspan(first, count);
  return view;
}

PagedInputs::PagedInputs(const Pack& pack, const PageLayout& layout)
    : QueryTensors(pack, layout.padding) {
  const PackSpec& spec = pack.spec;
  const std::int64_t size = layout.page_size;
  std::int64_t max_pages = 1;
  std::int64_t pages = 1;  // one page that no sequence uses
  for (const SequenceSpec& sequence : spec.sequences) {
    const std::int64_t used = (sequence.keys + size - 1) / size;
    max_pages = std::max(max_pages, used);
    pages += used;
  }
  std::vector<std::int32_t> order(static_cast<std::size_t>(pages));
  std::iota(order.begin(), order.end(), 0);
  if (layout.shuffle != 0) {
    std::shuffle(order.begin(), order.end(), std::mt19937_64(layout.shuffle));
  }
  const std::int64_t dense =
      layout.tail ? page_tail(spec.dim, size).page_stride : size * (spec.dim + 4);
  const std::int64_t page_stride = dense + 4 * layout.padding;
  const std::int64_t table_stride = max_pages + layout.padding;
  const std::int64_t groups = size / kGroupSize;
  cache_.assign(static_cast<std::size_t>(pages * page_stride), 0xff);
  const std::int64_t sums_stride = groups * spec.dim + layout.padding;
  page_sums_.assign(static_cast<std::size_t>(pages * sums_stride), kNaN);
  CacheSpan cache{cache_.data(), pages, spec.dim, page_stride};
  cache.page_size = size;
  if (layout.tail) {
    cache = with_tail(cache);
  } else if (layout.page_sums && groups > 0) {
    cache.page_sums = page_sums_.data();
    cache.page_sums_stride = sums_stride;
  }
  block_table_.assign(spec.sequences.size() * static_cast<std::size_t>(table_stride), 0);
  query_starts_.push_back(0);
  std::int64_t next = 0;
  for (std::size_t i = 0; i < spec.sequences.size(); ++i) {
    const SequenceSpec& sequence = spec.sequences[i];
    context_lens_.push_back(static_cast<std::int32_t>(sequence.keys));
    query_starts_.push_back(query_starts_.back() + static_cast<std::int32_t>(sequence.queries));
    for (std::int64_t query = 0; query < sequence.queries; ++query) {
      row_lens_.push_back(static_cast<std::int32_t>(sequence.keys - sequence.queries + 1 + query));
    }
    for (std::int64_t position = 0; position < sequence.keys; ++position) {
      const std::int64_t slot = position % size;
      auto& entry = block_table_[static_cast<std::int64_t>(i) * table_stride + position / size];
      if (slot == 0) {
        entry = order[next++];
      }
      std::uint8_t* page = cache_.data() + entry * page_stride;
      const float scale = pack.scale[i][position];
      std::memcpy(page + slot * spec.dim, pack.k[i].data() + position * spec.dim,
                  static_cast<std::size_t>(spec.dim));
      std::memcpy(page + size * spec.dim + 4 * slot, &scale, sizeof scale);
      if (cache.page_sums == nullptr) {
        continue;
      }
      float* sum = cache.page_sums + entry * cache.page_sums_stride + slot / kGroupSize * spec.dim;
      for (std::int64_t d = 0; d < spec.dim; ++d) {
        sum[d] = (slot % kGroupSize == 0 ? 0.0F : sum[d]) +
                 scale * e4m3_to_float(page[slot * spec.dim + d]);
      }
    }
  }
  keys_.cache = {
      cache.data, pages, spec.dim, page_stride, cache.page_sums, size, cache.page_sums_stride};
  keys_.max_pages = max_pages;
  keys_.block_table_stride = table_stride;
  const bool starts =
      layout.lengths == Lengths::query_starts || layout.lengths == Lengths::starts_and_rows;
  keys_.next_n = starts ? 1 : spec.sequences.front().queries;
  if (starts) {
    keys_.query_starts = query_starts_;
  }
  if (layout.lengths == Lengths::rows || layout.lengths == Lengths::starts_and_rows) {
    keys_.row_lens = row_lens_;
  }
}

PagedKeys PagedInputs::k(Rows rows) const {
  PagedKeys view = keys_;
  const auto count = static_cast<std::size_t>(rows.count);
  if (!view.row_lens.empty()) {
    view.row_lens = view.row_lens.subspan(static_cast<std::size_t>(rows.first), count);
  }
  if (!view.query_starts.empty()) {
    view.block_table = block_table_.data();
    view.context_lens = context_lens_;
    return view;
  }
  const auto first = static_cast<std::size_t>(rows.first / keys_.next_n);
  view.block_table =
      block_table_.data() + first * static_cast<std::size_t>(keys_.block_table_stride);
  if (view.row_lens.empty()) {
    view.context_lens = std::span(context_lens_).subspan(first, count / keys_.next_n);
  }
  return view;
}

}  // namespace misa::test
