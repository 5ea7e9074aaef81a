// SPDX-License-Identifier: Apache-2.0
// Outputs in every form that a Selection offers, and what each form makes of the plain output.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <limits>
#include <span>
#include <string>
#include <vector>

#include "misa/indexer.hpp"
#include "support/inputs.hpp"

namespace misa::test {

struct Form {
  std::string name;
  std::int64_t index_padding = 0;  // elements between rows
  std::int64_t score_padding = 0;
  bool scores = true;
  bool slots = false;
  std::vector<std::int32_t> offsets = {};
};

// Strides that keep and that break the alignment of rows.
inline std::vector<Form> strided_forms(int top_k) {
  return {{", strided", 8, top_k}, {", oddly strided", 3, 1}, {", indices alone", 5, 0, false}};
}

// `starts`: the rows' first keys.
inline std::vector<Form> ragged_forms(int top_k, std::span<const std::int32_t> starts) {
  std::vector<Form> forms = strided_forms(top_k);
  forms.push_back({", flattened", 0, 0, true, false, {starts.begin(), starts.end()}});
  forms.push_back({", flattened and strided", 1, 2, false, false, {starts.begin(), starts.end()}});
  return forms;
}

inline std::vector<Form> paged_forms(int top_k, std::int64_t tokens) {
  std::vector<std::int32_t> offsets;
  for (std::int64_t t = 0; t < tokens; ++t) {
    offsets.push_back(static_cast<std::int32_t>(1000 * t - 7));
  }
  offsets.back() = std::numeric_limits<std::int32_t>::max();  // sums wrap
  std::vector<Form> forms = strided_forms(top_k);
  forms.push_back({", with offsets", 0, 0, true, false, offsets});
  forms.push_back({", slots", 0, 0, true, true});
  forms.push_back({", slots, strided", 7, 1, false, true});
  return forms;
}

// The sequence of each query.
inline std::vector<std::int32_t> sequences_of(const PackSpec& spec) {
  std::vector<std::int32_t> sequences;
  for (std::size_t b = 0; b < spec.sequences.size(); ++b) {
    sequences.insert(sequences.end(), spec.sequences[b].queries, static_cast<std::int32_t>(b));
  }
  return sequences;
}

// The arrays that a call in one form writes, filled with a value that no call writes.
class FormedOutput {
 public:
  FormedOutput(std::int64_t tokens, int top_k, const Form& form)
      : tokens_(tokens), top_k_(top_k), slots_(form.slots) {
    index_stride_ = top_k + form.index_padding;
    score_stride_ = top_k + form.score_padding;
    indices_.assign(elements(index_stride_), kPoison);
    scores_.assign(form.scores ? elements(score_stride_) : 0, static_cast<float>(kPoison));
  }

  // Of these arrays; of copies of them elsewhere, if given.
  [[nodiscard]] Selection selection(std::span<const std::int32_t> offsets) {
    return selection(indices_, scores_, offsets);
  }
  [[nodiscard]] Selection selection(std::span<std::int32_t> indices, std::span<float> scores,
                                    std::span<const std::int32_t> offsets) const {
    Selection out;
    out.indices = indices;
    out.scores = scores;
    out.index_stride = index_stride_;
    out.score_stride = score_stride_;
    out.slots = slots_;
    out.offsets = offsets;
    return out;
  }

  [[nodiscard]] std::vector<std::int32_t>& index_array() { return indices_; }
  [[nodiscard]] std::vector<float>& score_array() { return scores_; }

  // The rows without what lies between them.
  [[nodiscard]] std::vector<std::int32_t> indices() const {
    std::vector<std::int32_t> dense;
    for (std::int64_t t = 0; t < tokens_; ++t) {
      const auto row = indices_.begin() + t * index_stride_;
      dense.insert(dense.end(), row, row + top_k_);
    }
    return dense;
  }

  // Whether the scores, where there are any, are bit for bit those of a plain output.
  [[nodiscard]] bool same_scores(const FormedOutput& plain) const {
    for (std::int64_t i = 0; !scores_.empty() && i < tokens_ * top_k_; ++i) {
      const float mine = scores_[i / top_k_ * score_stride_ + i % top_k_];
      if (std::bit_cast<std::uint32_t>(mine) != std::bit_cast<std::uint32_t>(plain.scores_[i])) {
        return false;
      }
    }
    return true;
  }

  [[nodiscard]] bool padding_untouched() const {
    for (std::int64_t i = 0; i < std::ssize(indices_); ++i) {
      if (i % index_stride_ >= top_k_ && indices_[i] != kPoison) {
        return false;
      }
    }
    for (std::int64_t i = 0; i < std::ssize(scores_); ++i) {
      if (i % score_stride_ >= top_k_ && scores_[i] != static_cast<float>(kPoison)) {
        return false;
      }
    }
    return true;
  }

  // What other forms make of this plain output.
  [[nodiscard]] std::vector<std::int32_t> with_offsets(
      std::span<const std::int32_t> offsets) const {
    std::vector<std::int32_t> made = indices();
    for (std::int64_t i = 0; !offsets.empty() && i < std::ssize(made); ++i) {
      if (made[i] >= 0) {
        made[i] = static_cast<std::int32_t>(std::int64_t{made[i]} + offsets[i / top_k_]);
      }
    }
    return made;
  }
  // block_table: that of `keys` in host memory, whose entries may be out of range.
  [[nodiscard]] std::vector<std::int32_t> slots(
      const PagedKeys& keys, std::span<const std::int32_t> sequences,
      const std::vector<std::int32_t>& block_table) const {
    const std::int64_t stride =
        keys.block_table_stride != 0 ? keys.block_table_stride : keys.max_pages;
    std::vector<std::int32_t> made = indices();
    for (std::int64_t i = 0; i < std::ssize(made); ++i) {
      if (made[i] >= 0) {
        const std::int64_t entry = sequences[i / top_k_] * stride + made[i] / keys.cache.page_size;
        const std::int64_t page = block_table[entry];
        const std::int64_t slot = page * keys.cache.page_size + made[i] % keys.cache.page_size;
        made[i] = page >= 0 && page < keys.cache.pages ? static_cast<std::int32_t>(slot) : -1;
      }
    }
    return made;
  }

 private:
  static constexpr std::int32_t kPoison = -77;

  [[nodiscard]] std::size_t elements(std::int64_t stride) const {
    return static_cast<std::size_t>((tokens_ - 1) * stride + top_k_);
  }

  std::int64_t tokens_;
  std::int64_t top_k_;
  bool slots_;
  std::int64_t index_stride_;
  std::int64_t score_stride_;
  std::vector<std::int32_t> indices_;
  std::vector<float> scores_;
};

}  // namespace misa::test
