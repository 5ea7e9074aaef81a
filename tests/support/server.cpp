// SPDX-License-Identifier: Apache-2.0
#include "support/server.hpp"

#include <algorithm>
#include <cstring>
#include <limits>
#include <numeric>
#include <utility>

namespace misa::test {
namespace {

constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

// The floats of an f32 pack's only sequence.
std::vector<float> floats_of(const Pack& pack) {
  std::vector<float> values(pack.k[0].size() / sizeof(float));
  std::memcpy(values.data(), pack.k[0].data(), pack.k[0].size());
  return values;
}

}  // namespace

Documents::Documents(const DocumentsSpec& spec) : spec_(spec) {
  const auto dim = static_cast<std::size_t>(spec.dim);
  std::int64_t row = 0;
  for (const SequenceSpec& document : spec.documents) {
    PackSpec unquantised;
    unquantised.sequences = {document};
    unquantised.heads = spec.heads;
    unquantised.dim = spec.dim;
    unquantised.q_dtype = spec.q_dtype;
    unquantised.seed = spec.seed + packs_.size();
    Pack pack = make_pack(unquantised);
    keys_.push_back(floats_of(pack));
    pack.spec.k_dtype = DType::e4m3;
    pack.k[0].resize(keys_.back().size());
    for (std::int64_t position = 0; position < document.keys; ++position) {
      std::vector<std::uint8_t> bytes(dim);
      pack.scale[0][position] =
          quantize(std::span(keys_.back()).subspan(position * dim, dim), spec.format, bytes);
      std::memcpy(&pack.k[0][position * dim], bytes.data(), dim);
    }
    packs_.push_back(std::move(pack));
    first_row_.push_back(row);
    row += document.queries;
  }
}

std::int64_t Documents::first(std::int64_t document) const {
  return spec_.documents[document].keys - spec_.documents[document].queries;
}

std::int64_t Documents::row(std::int64_t document, std::int64_t position) const {
  return first_row_[document] + position - first(document);
}

Pack Documents::part(std::int64_t row) const {
  const auto next = std::upper_bound(first_row_.begin(), first_row_.end(), row);
  const std::int64_t document = next - first_row_.begin() - 1;
  return cut(packs_[document], {row - first_row_[document], 1});
}

std::span<const float> Documents::key(std::int64_t document, std::int64_t position) const {
  const auto dim = static_cast<std::size_t>(spec_.dim);
  return std::span(keys_[document]).subspan(position * dim, dim);
}

Server::Server(const Documents& documents, const ServerSpec& spec)
    : documents_(documents),
      spec_(spec),
      random_(spec.seed),
      sequences_(static_cast<std::size_t>(spec.sequences)) {
  for (const SequenceSpec& document : documents.spec().documents) {
    max_keys_ = std::max(max_keys_, document.keys + spec.rows);
  }
  max_pages_ = pages_of(max_keys_) + 2;
  // Enough for all sequences at their longest in one step, and for those of the step before.
  pages_ = (2 * spec.sequences + 1) * pages_of(max_keys_);
  references_.resize(static_cast<std::size_t>(pages_));
  free_.resize(static_cast<std::size_t>(pages_));
  std::iota(free_.begin(), free_.end(), 0);
  std::shuffle(free_.begin(), free_.end(), random_);
  if (spec.follows) {
    sequences_[0].document = 0;
    sequences_[0].last = documents.spec().documents[0].keys;
  }
}

bool Server::done() const { return spec_.follows && sequences_[0].length == sequences_[0].last; }

std::int64_t Server::pages_of(std::int64_t tokens) const {
  return (tokens + spec_.page_size - 1) / spec_.page_size;
}

std::int64_t Server::random(std::int64_t least, std::int64_t most) {
  return least +
         static_cast<std::int64_t>(random_() % static_cast<std::uint64_t>(most - least + 1));
}

// One of the pages that were freed last, so that pages are soon reused.
std::int32_t Server::allocate() {
  const std::int64_t recent = std::min<std::int64_t>(std::ssize(free_), 8);
  std::swap(free_.back(), free_[std::ssize(free_) - random(1, recent)]);
  const std::int32_t page = free_.back();
  free_.pop_back();
  references_[page] = 1;
  return page;
}

void Server::release(std::int32_t page) {
  if (--references_[page] == 0) {
    freed_.push_back(page);
  }
}

void Server::cut_off(Sequence& sequence, std::int64_t length) {
  sequence.length = length;
  while (std::ssize(sequence.pages) > pages_of(length)) {
    release(sequence.pages.back());
    sequence.pages.pop_back();
  }
}

// Gives a sequence a copy of one of its pages.
void Server::replace(Sequence& sequence, std::int64_t index, Step& step) {
  const std::int32_t copy = allocate();
  step.from.push_back(std::exchange(sequence.pages[index], copy));
  step.to.push_back(copy);
  release(step.from.back());
}

void Server::append(Sequence& sequence, std::int64_t position, std::span<const float> key,
                    Step& step) {
  const std::int64_t index = position / spec_.page_size;
  if (index == std::ssize(sequence.pages)) {
    sequence.pages.push_back(allocate());
  } else if (references_[sequence.pages[index]] > 1) {
    replace(sequence, index, step);
  }
  step.slots.push_back(sequence.pages[index] * spec_.page_size + position % spec_.page_size);
  step.keys.insert(step.keys.end(), key.begin(), key.end());
}

// Shares the pages of another sequence; false if no other one has any.
bool Server::begin_as_another(Sequence& sequence) {
  const Sequence& other = sequences_[random(0, spec_.sequences - 1)];
  if (other.document < 0 || other.length <= documents_.first(other.document)) {
    return false;
  }
  sequence.document = other.document;
  sequence.length = random(documents_.first(other.document), other.length);
  sequence.pages.assign(other.pages.begin(), other.pages.begin() + pages_of(sequence.length));
  for (const std::int32_t page : sequence.pages) {
    ++references_[page];
  }
  return true;
}

void Server::begin(Sequence& sequence, Step& step) {
  if (!one_in(3) || !begin_as_another(sequence)) {
    const auto documents = std::ssize(documents_.spec().documents);
    // The document that is followed is long.
    sequence.document = random(spec_.follows && documents > 1 ? 1 : 0, documents - 1);
    sequence.length = random(documents_.first(sequence.document),
                             documents_.spec().documents[sequence.document].keys - 1);
    for (std::int64_t position = 0; position < sequence.length; ++position) {
      append(sequence, position, documents_.key(sequence.document, position), step);
    }
  }
  sequence.last = random(sequence.length, documents_.spec().documents[sequence.document].keys);
}

// Begins, ends, rewinds or moves a sequence; whether it decodes in this step. One that has begun
// waits, so that a page is never copied in the step that writes it.
bool Server::change(Sequence& sequence, Step& step) {
  if (sequence.document < 0) {
    if (one_in(2)) {
      begin(sequence, step);
    }
    return false;
  }
  cut_off(sequence, sequence.length);  // pages of rejected tokens
  const bool followed = spec_.follows && &sequence == sequences_.data();
  if (sequence.length >= sequence.last || (!followed && one_in(200))) {
    cut_off(sequence, 0);
    sequence = {};
    return false;
  }
  const std::int64_t most = sequence.length - documents_.first(sequence.document);
  if (most > 0 && one_in(64)) {
    const bool far = !followed && one_in(8);
    cut_off(sequence, sequence.length - random(1, far ? most : std::min<std::int64_t>(most, 20)));
  }
  if (!sequence.pages.empty() && one_in(16)) {
    replace(sequence, random(0, std::ssize(sequence.pages) - 1), step);
  }
  return true;
}

void Server::idle(Step& step) {
  step.context_lens.push_back(static_cast<std::int32_t>(random(-9, 0)));
  step.rows.resize(step.rows.size() + (spec_.equal_rows ? spec_.rows : random(0, spec_.rows)),
                   kEmptyRow);
}

// A rejected token's key.
std::vector<float> Server::noise() {
  std::vector<float> key(static_cast<std::size_t>(documents_.spec().dim));
  for (float& value : key) {
    value = one_in(500) ? kNaN : static_cast<float>(random(-1000, 1000));
  }
  return key;
}

void Server::decode(Sequence& sequence, Step& step) {
  const std::int64_t rows = spec_.equal_rows ? spec_.rows : random(0, spec_.rows);
  const std::int64_t accepted =
      std::min(one_in(4) ? random(std::min<std::int64_t>(rows, 1), rows) : rows,
               sequence.last - sequence.length);
  for (std::int64_t i = 0; i < rows; ++i) {
    const std::int64_t position = sequence.length + i;
    if (i < accepted) {
      append(sequence, position, documents_.key(sequence.document, position), step);
      step.rows.push_back(documents_.row(sequence.document, position));
    } else {
      append(sequence, position, noise(), step);
      step.rows.push_back(kAnyRow);
    }
  }
  step.context_lens.push_back(static_cast<std::int32_t>(sequence.length + rows));
  sequence.length += accepted;
}

void Server::write_table(Step& step) {
  for (const Sequence& sequence : sequences_) {
    step.block_table.insert(step.block_table.end(), sequence.pages.begin(), sequence.pages.end());
    for (std::int64_t i = std::ssize(sequence.pages); i < max_pages_; ++i) {
      constexpr std::int32_t kMost = std::numeric_limits<std::int32_t>::max();
      const std::int32_t garbage[]{-1, kMost, -kMost - 1, 0, static_cast<std::int32_t>(pages_)};
      step.block_table.push_back(garbage[random(0, std::ssize(garbage) - 1)]);
    }
  }
}

Step Server::next() {
  free_.insert(free_.end(), freed_.begin(), freed_.end());
  freed_.clear();
  Step step;
  step.query_starts.push_back(0);
  for (Sequence& sequence : sequences_) {
    if (change(sequence, step)) {
      decode(sequence, step);
    } else {
      idle(step);
    }
    step.query_starts.push_back(static_cast<std::int32_t>(step.rows.size()));
  }
  write_table(step);
  return step;
}

namespace {

// Compares a row of an output with its row of the prefill, or with the value of an empty row.
template <class T>
::testing::AssertionResult same_row(const char* what, const std::vector<T>& wanted,
                                    std::int64_t wanted_rows, std::int64_t row,
                                    const std::vector<T>& got, std::int64_t got_rows,
                                    std::int64_t t, T empty) {
  const std::int64_t width = wanted_rows > 0 ? std::ssize(wanted) / wanted_rows : 0;
  if (std::ssize(got) != got_rows * width) {
    return ::testing::AssertionFailure() << what << ": " << got.size() << " entries";
  }
  for (std::int64_t i = 0; i < width; ++i) {
    const T want = row == kEmptyRow ? empty : wanted[row * width + i];
    if (std::memcmp(&want, &got[t * width + i], sizeof(T)) != 0) {
      return ::testing::AssertionFailure()
             << what << "[" << t << ", " << i << "], row " << row << " of the documents: expected "
             << want << ", got " << got[t * width + i];
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace

::testing::AssertionResult same_rows(const Selected& prefill, std::span<const std::int64_t> rows,
                                     const Selected& result) {
  const std::int64_t count = std::ssize(rows);
  const auto same = [&](const char* what, const auto& wanted, const auto& got, std::int64_t t,
                        auto empty) {
    return same_row(what, wanted, prefill.tokens, rows[t], got, count, t, empty);
  };
  for (std::int64_t t = 0; t < count; ++t) {
    if (rows[t] == kAnyRow) {
      continue;
    }
    for (const ::testing::AssertionResult& equal :
         {same("heads", prefill.heads, result.heads, t, std::int32_t{-1}),
          same("residual", prefill.residual, result.residual, t, 0.0F),
          same("indices", prefill.indices, result.indices, t, std::int32_t{-1}),
          same("scores", prefill.scores, result.scores, t,
               -std::numeric_limits<float>::infinity())}) {
      if (!equal) {
        return equal;
      }
    }
  }
  return ::testing::AssertionSuccess();
}

}  // namespace misa::test
