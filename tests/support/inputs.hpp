// SPDX-License-Identifier: Apache-2.0
// Generated inputs: a pack of sequences, encoded once and laid out ragged or paged. All padding
// is filled with NaN, so that reading it changes results.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <vector>

#include "misa/view.hpp"

namespace misa::test {

// The last `queries` positions of a sequence have queries: query i sees keys - queries + 1 + i keys
// (none where that is not positive).
struct SequenceSpec {
  std::int64_t keys;
  std::int64_t queries;
};

enum class Values {
  normal,    // independent normal entries; about half of the weights negative
  integers,  // small integers, for which every sum of DSA is exact in fp32; ties are common
  zero,      // all q, k and w are zero
  repeated,  // every key of a sequence is the same
};

struct PackSpec {
  std::vector<SequenceSpec> sequences;
  std::int64_t heads = 8;
  std::int64_t dim = 64;
  DType q_dtype = DType::f32;
  DType k_dtype = DType::f32;
  Values values = Values::normal;
  std::uint64_t seed = 1;
};

// The tensors of a pack, dense and encoded.
struct Pack {
  PackSpec spec;
  std::vector<std::byte> q;               // [T, H, D]
  std::vector<float> w;                   // [T, H]
  std::vector<std::vector<std::byte>> k;  // per sequence: [keys, D]
  std::vector<std::vector<float>> scale;  // per sequence: [keys]; all 1 unless keys are e4m3

  [[nodiscard]] std::int64_t tokens() const;
  void set_q(std::int64_t t, std::int64_t j, std::int64_t d, float value);
  void set_k(std::int64_t sequence, std::int64_t position, std::int64_t d, float value);
};

Pack make_pack(const PackSpec& spec);

// A run of queries.
struct Rows {
  std::int64_t first;
  std::int64_t count;
};

// Some of the queries of a pack of one sequence, and the keys up to the last one that they see.
Pack cut(const Pack& pack, Rows rows);

// The sequences of several packs of the same heads, size and dtypes.
Pack concat(const std::vector<Pack>& packs);

// Writes a value as element i of a row of any dtype.
void encode(float value, DType dtype, std::byte* row, std::int64_t i);

// Queries and weights with padded strides.
class QueryTensors {
 public:
  QueryTensors(const Pack& pack, std::int64_t padding);

  [[nodiscard]] std::int64_t tokens() const { return queries_.tokens; }
  [[nodiscard]] Rows all() const { return {0, tokens()}; }
  [[nodiscard]] Queries q(Rows rows) const;
  [[nodiscard]] Weights w(Rows rows) const;

 private:
  std::vector<std::byte> q_;
  std::vector<float> w_;
  Queries queries_;
  Weights weights_;
};

// The keys of all sequences, concatenated; `padding` is added to every stride, and as many unused
// tokens separate the sequences.
class RaggedInputs : public QueryTensors {
 public:
  explicit RaggedInputs(const Pack& pack, std::int64_t padding = 0);

  [[nodiscard]] RaggedKeys k(Rows rows) const;

 private:
  std::vector<std::byte> k_;
  std::vector<float> scale_;
  std::vector<std::int32_t> starts_;
  std::vector<std::int32_t> ends_;
  RaggedKeys keys_;
};

// How a paged call says which keys its queries see.
enum class Lengths {
  next_n,        // context_lens and next_n; all sequences have the same number of queries
  query_starts,  // context_lens and query_starts
  rows,          // row_lens and next_n
  starts_and_rows,
};

struct PageLayout {
  std::uint64_t shuffle = 0;  // seed of the order of pages; 0: in order
  std::int64_t padding = 0;   // of the page stride, in units of 4 bytes, and of the block table's
  bool page_sums = false;
  std::int64_t page_size = kPageSize;
  bool tail = false;  // padding is 0, or a multiple of 32; page sums stand in the pages
  Lengths lengths = Lengths::next_n;
};

// An e4m3 pack in a paged cache.
class PagedInputs : public QueryTensors {
 public:
  explicit PagedInputs(const Pack& pack, const PageLayout& layout = {});

  // Whole sequences only; with query_starts, all rows.
  [[nodiscard]] PagedKeys k(Rows rows) const;

 private:
  std::vector<std::uint8_t> cache_;
  std::vector<float> page_sums_;
  std::vector<std::int32_t> block_table_;
  std::vector<std::int32_t> context_lens_;
  std::vector<std::int32_t> query_starts_;
  std::vector<std::int32_t> row_lens_;
  PagedKeys keys_;
};

}  // namespace misa::test
