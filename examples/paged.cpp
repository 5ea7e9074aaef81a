// SPDX-License-Identifier: Apache-2.0
// Decode from a paged key cache: keys are appended to pages that carry their page sums and
// sketches, then a query of each sequence selects. The selection has to be that of the same keys in
// one array, and to have the last position, whose key is made to matter.
#include <algorithm>
#include <cstdio>
#include <misa/misa.hpp>
#include <random>

namespace {

constexpr std::int64_t kSequences = 2, kHeads = 32, kDim = 128;
constexpr std::int64_t kPages = 128, kMaxPages = kPages / kSequences;
constexpr int kTopK = 512, kSketchBits = 2;

// What a workspace is aligned to.
struct alignas(64) CacheLine {
  std::byte bytes[64];
};

// Values between -0.5 and 0.5.
std::vector<float> values(std::int64_t count, unsigned seed) {
  std::mt19937 bits(seed);
  std::vector<float> out(count);
  std::generate(out.begin(), out.end(),
                [&] { return static_cast<float>(bits()) * 0x1p-32F - 0.5F; });
  return out;
}

}  // namespace

int main() try {
  // Pages of 64 keys whose tails have the page sums, the largest scales and the sketch.
  const std::int64_t stride = misa::page_tail(kDim, misa::kPageSize, kSketchBits).page_stride;
  std::vector<std::uint8_t> bytes(kPages * stride);
  const misa::CacheSpan written = misa::with_tail(misa::CacheSpan{.data = bytes.data(),
                                                                  .pages = kPages,
                                                                  .dim = kDim,
                                                                  .page_stride = stride,
                                                                  .sketch_bits = kSketchBits});
  const misa::CacheView cache = misa::with_tail(misa::CacheView{.data = bytes.data(),
                                                                .pages = kPages,
                                                                .dim = kDim,
                                                                .page_stride = stride,
                                                                .sketch_bits = kSketchBits});

  // The pages of the sequences alternate.
  std::vector<std::int32_t> block_table(kPages);
  for (std::int64_t page = 0; page < kPages; ++page) {
    block_table[page % kSequences * kMaxPages + page / kSequences] =
        static_cast<std::int32_t>(page);
  }
  const auto slot = [&](std::int64_t sequence, std::int64_t position) {
    const std::int64_t page = block_table[sequence * kMaxPages + position / misa::kPageSize];
    return page * misa::kPageSize + position % misa::kPageSize;
  };

  const std::vector<float> q = values(kSequences * kHeads * kDim, 1);
  const std::vector<float> w(kSequences * kHeads, 0.1F);
  const misa::Queries queries{q.data(), misa::DType::f32, kSequences, kHeads, kDim};
  const misa::Weights weights{w.data(), kSequences, kHeads};

  // The prompts.
  std::vector<std::int32_t> lengths{3000, 4000};
  for (std::int64_t b = 0; b < kSequences; ++b) {
    const std::vector<float> k = values(lengths[b] * kDim, 2 + static_cast<unsigned>(b));
    std::vector<std::int64_t> slots(lengths[b]);
    for (std::int64_t s = 0; s < lengths[b]; ++s) {
      slots[s] = slot(b, s);
    }
    misa::append(written, {k.data(), misa::DType::f32, lengths[b], kDim}, slots);
  }

  // Hierarchical MISA: heads are routed by block means, which are made of page sums, and score by
  // the sketch; all heads re-rank the best positions. Planned once.
  misa::IndexerConfig config = misa::IndexerConfig::misa_dagger(kTopK, /*heads=*/8, 2 * kTopK);
  config.sketch = kSketchBits;
  config.ordered = true;
  const misa::Context context;
  const misa::Plan plan(context, config,
                        {kSequences, kHeads, kDim, /*max_keys=*/kMaxPages * misa::kPageSize,
                         misa::DType::f32, misa::DType::e4m3});
  std::vector<CacheLine> memory(plan.workspace_bytes() / sizeof(CacheLine) + 1);

  // A step of decode: each sequence gets a token, and its query sees all keys up to that. A key
  // that is the sum of all heads' queries has a large score.
  std::vector<float> token(kSequences * kDim);
  for (std::size_t i = 0; i < q.size(); ++i) {
    token[i / (kHeads * kDim) * kDim + i % kDim] += q[i];
  }
  const std::vector<std::int64_t> slots{slot(0, lengths[0]++), slot(1, lengths[1]++)};
  misa::append(written, {token.data(), misa::DType::f32, kSequences, kDim}, slots);
  misa::PagedKeys keys{cache, block_table.data(), kMaxPages};
  keys.context_lens = lengths;
  std::vector<std::int32_t> indices(kSequences * kTopK);
  misa::Selection out;
  out.indices = indices;
  plan.run(queries, weights, keys, out, std::as_writable_bytes(std::span(memory)));

  for (std::int64_t b = 0; b < kSequences; ++b) {
    const std::span row = std::span(indices).subspan(b * kTopK, kTopK);
    std::printf("sequence %d attends to positions %d ... %d of %d\n", static_cast<int>(b),
                row.front(), row.back(), lengths[b]);

    // The same without pages, page sums and sketches.
    std::vector<std::uint8_t> k(lengths[b] * kDim);
    std::vector<float> scale(lengths[b]);
    misa::gather(cache, std::span(block_table).subspan(b * kMaxPages, kMaxPages), lengths[b], k,
                 scale);
    const std::vector<std::int32_t> ks{0}, ke{lengths[b]};
    const misa::Selected same = misa::select(
        context, config, {q.data() + b * kHeads * kDim, misa::DType::f32, 1, kHeads, kDim},
        {w.data(), 1, kHeads},
        {k.data(), misa::DType::e4m3, lengths[b], kDim, 0, scale.data(), ks, ke});
    if (!std::ranges::equal(row, same.indices) || row.back() != lengths[b] - 1) {
      std::fprintf(stderr, "expected the selection from one array, with the last position\n");
      return 1;
    }
  }
} catch (const misa::Error& error) {
  std::fprintf(stderr, "%s\n", error.what());
  return 1;
}
