// SPDX-License-Identifier: Apache-2.0
// A server that decodes: sequences that grow step by step in the pages of a cache, which are
// shared, copied, freed and reused. The tokens are those of a few documents, so that what a row has
// to select is what a prefill of the documents selects for it.
#pragma once

#include <gtest/gtest.h>

#include <cstdint>
#include <random>
#include <span>
#include <vector>

#include "misa/cache.hpp"
#include "misa/indexer.hpp"
#include "support/inputs.hpp"

namespace misa::test {

struct DocumentsSpec {
  std::vector<SequenceSpec> documents;
  std::int64_t heads = 8;
  std::int64_t dim = 64;
  DType q_dtype = DType::e4m3;
  ScaleFormat format = ScaleFormat::f32;
  std::uint64_t seed = 1;
};

// What the sequences of a server consist of: keys, and queries at the last positions.
class Documents {
 public:
  explicit Documents(const DocumentsSpec& spec);

  [[nodiscard]] const DocumentsSpec& spec() const { return spec_; }
  // One document; its e4m3 keys are those that `append` makes of keys().
  [[nodiscard]] const Pack& pack(std::int64_t document) const { return packs_[document]; }
  [[nodiscard]] Pack whole() const { return concat(packs_); }
  // The first position with a query.
  [[nodiscard]] std::int64_t first(std::int64_t document) const;
  // The row of whole() that stands at a position.
  [[nodiscard]] std::int64_t row(std::int64_t document, std::int64_t position) const;
  // A row of whole() and the keys that it sees.
  [[nodiscard]] Pack part(std::int64_t row) const;
  // A key before it was quantised.
  [[nodiscard]] std::span<const float> key(std::int64_t document, std::int64_t position) const;

 private:
  DocumentsSpec spec_;
  std::vector<Pack> packs_;
  std::vector<std::vector<float>> keys_;  // [keys, D]
  std::vector<std::int64_t> first_row_;
};

struct ServerSpec {
  std::int64_t sequences = 4;
  std::int64_t rows = 1;  // queries of a sequence in one step
  // Every sequence has as many queries; otherwise 0 to `rows`, as speculative decoding leaves them.
  bool equal_rows = true;
  // Sequence 0 decodes document 0 from its first token to its last. The other sequences, and all of
  // them if it does not, begin with a prompt of any length, or with a part of another sequence.
  bool follows = false;
  std::int64_t page_size = kPageSize;
  std::uint64_t seed = 1;
};

// In place of the row of a query: it sees no keys; it is of a token that is rejected, or after one.
inline constexpr std::int64_t kEmptyRow = -1;
inline constexpr std::int64_t kAnyRow = -2;

// What happens in one step, in this order.
struct Step {
  std::vector<std::int32_t> from;  // pages that are copied
  std::vector<std::int32_t> to;
  std::vector<std::int64_t> slots;  // of the keys that are appended
  std::vector<float> keys;          // [slots, D]
  // The call. Rows of sequences without keys have a length of zero or below.
  std::vector<std::int32_t> block_table;   // [sequences, max_pages]; unused entries are garbage
  std::vector<std::int32_t> context_lens;  // [sequences]
  std::vector<std::int32_t> query_starts;  // [sequences + 1]
  std::vector<std::int64_t> rows;          // per query: its row of the documents, or as above
};

class Server {
 public:
  Server(const Documents& documents, const ServerSpec& spec);

  [[nodiscard]] const ServerSpec& spec() const { return spec_; }
  [[nodiscard]] std::int64_t pages() const { return pages_; }
  [[nodiscard]] std::int64_t max_pages() const { return max_pages_; }
  // The most keys that a row sees.
  [[nodiscard]] std::int64_t max_keys() const { return max_keys_; }

  Step next();
  // Whether sequence 0 has decoded all of its document.
  [[nodiscard]] bool done() const;

 private:
  struct Sequence {
    std::int64_t document = -1;  // -1: none
    std::int64_t length = 0;     // tokens that are right
    std::int64_t last = 0;       // it ends at this length
    std::vector<std::int32_t> pages;
  };

  [[nodiscard]] std::int64_t pages_of(std::int64_t tokens) const;
  std::int64_t random(std::int64_t least, std::int64_t most);
  bool one_in(std::int64_t n) { return random(1, n) == 1; }

  std::int32_t allocate();
  void release(std::int32_t page);
  void cut_off(Sequence& sequence, std::int64_t length);
  void replace(Sequence& sequence, std::int64_t index, Step& step);
  void append(Sequence& sequence, std::int64_t position, std::span<const float> key, Step& step);

  void begin(Sequence& sequence, Step& step);
  bool begin_as_another(Sequence& sequence);
  bool change(Sequence& sequence, Step& step);
  void decode(Sequence& sequence, Step& step);
  void idle(Step& step);
  std::vector<float> noise();
  void write_table(Step& step);

  const Documents& documents_;
  ServerSpec spec_;
  std::int64_t max_keys_ = 0;
  std::int64_t max_pages_ = 0;
  std::int64_t pages_ = 0;
  std::mt19937_64 random_;
  std::vector<Sequence> sequences_;
  std::vector<std::int32_t> references_;  // per page
  std::vector<std::int32_t> free_;
  std::vector<std::int32_t> freed_;  // in this step; free from the next one on
};

// Whether every row of `result` has the bits of its row of a prefill of all documents.
::testing::AssertionResult same_rows(const Selected& prefill, std::span<const std::int64_t> rows,
                                     const Selected& result);

}  // namespace misa::test
