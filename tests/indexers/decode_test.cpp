// SPDX-License-Identifier: Apache-2.0
// Decoding from a cache whose pages are written, copied, freed and reused selects, bit for bit,
// what a prefill of the same tokens selects. tests/gpu/decode_test.cpp has the same on devices.
#include <utility>
#include <vector>

#include "common.hpp"
#include "misa/cache.hpp"
#include "support/server.hpp"

namespace misa::test {
namespace {

constexpr int kTopK = 48;
constexpr Want kEverything{true, true, true};

std::vector<NamedConfig> configs() {
  std::vector<NamedConfig> all = named_configs(kTopK, 2);
  const std::vector<NamedConfig> sketched = sketched_configs(kTopK, 2);
  all.insert(all.end(), sketched.begin(), sketched.end());
  return all;
}

// A cache in host memory, with page sums in the tails of its pages.
class Cache {
 public:
  Cache(const Server& server, std::int64_t dim)
      : pages_(server.pages()), dim_(dim), page_size_(server.spec().page_size) {
    data_.assign(static_cast<std::size_t>(pages_ * page_tail(dim, page_size_).page_stride), 0xFF);
  }

  [[nodiscard]] CacheSpan span() {
    CacheSpan span{data_.data(), pages_, dim_};
    span.page_size = page_size_;
    return with_tail(span);
  }
  [[nodiscard]] CacheView view() const {
    CacheView view{data_.data(), pages_, dim_};
    view.page_size = page_size_;
    return with_tail(view);
  }

 private:
  std::int64_t pages_;
  std::int64_t dim_;
  std::int64_t page_size_;
  std::vector<std::uint8_t> data_;
};

class Decode : public EachBackend {
 protected:
  // The queries of a step, out of those of all documents; rows of no document have any query.
  static Pack queries_of(const Pack& whole, const std::vector<std::int64_t>& rows) {
    Pack queries;
    queries.spec = whole.spec;
    queries.spec.sequences = {{0, std::ssize(rows)}};
    const auto width = std::ssize(whole.q) / whole.tokens();
    const std::int64_t heads = whole.spec.heads;
    for (const std::int64_t row : rows) {
      const std::int64_t source = std::max<std::int64_t>(row, 0);
      queries.q.insert(queries.q.end(), whole.q.begin() + source * width,
                       whole.q.begin() + (source + 1) * width);
      queries.w.insert(queries.w.end(), whole.w.begin() + source * heads,
                       whole.w.begin() + (source + 1) * heads);
    }
    return queries;
  }

  void expect_prefill(const DocumentsSpec& spec, const ServerSpec& server_spec) const {
    const Documents documents(spec);
    const Pack whole = documents.whole();
    Server server(documents, server_spec);
    std::vector<Selected> prefills;
    for (const NamedConfig& named : configs()) {
      prefills.push_back(run(context(), named.config, RaggedInputs(whole)));
    }
    Cache cache(server, spec.dim);
    for (int number = 0; !server.done(); ++number) {
      const Step step = server.next();
      copy_pages(cache.view(), step.from, cache.span(), step.to);
      append(cache.span(), {step.keys.data(), DType::f32, std::ssize(step.slots), spec.dim},
             step.slots, spec.format);
      const Pack pack = queries_of(whole, step.rows);
      const QueryTensors queries(pack, 0);
      PagedKeys keys;
      keys.cache = cache.view();
      keys.block_table = step.block_table.data();
      keys.max_pages = server.max_pages();
      keys.context_lens = step.context_lens;
      if (server_spec.equal_rows) {
        keys.next_n = server_spec.rows;
      } else {
        keys.query_starts = step.query_starts;
      }
      for (std::size_t i = 0; i < prefills.size(); ++i) {
        const Rows all = queries.all();
        ASSERT_TRUE(same_rows(prefills[i], step.rows,
                              select(context(), configs()[i].config, queries.q(all), queries.w(all),
                                     keys, kEverything)))
            << configs()[i].name << ", step " << number;
      }
    }
  }
};

// One sequence passes the sizes of pages, groups, blocks and top k; others come and go beside it.
TEST_P(Decode, TokenByTokenIsPrefill) {
  expect_prefill({{{200, 200}, {330, 330}, {70, 70}}, 6, 64, DType::bf16},
                 {3, 1, true, true, 64, 1});
}

TEST_P(Decode, SeveralTokensAreAPrefill) {
  expect_prefill({{{200, 200}, {330, 330}, {70, 70}}, 6, 128, DType::e4m3, ScaleFormat::ue8m0, 2},
                 {3, 4, true, true, 128, 2});
  expect_prefill({{{200, 200}, {330, 330}, {70, 70}}, 6, 64, DType::e4m3, ScaleFormat::f32, 3},
                 {3, 5, false, true, 32, 3});
}

TEST_P(Decode, SmokeAFewTokensAreAPrefill) {
  expect_prefill({{{70, 70}, {150, 150}}, 6, 64, DType::e4m3, ScaleFormat::f32, 4},
                 {2, 3, false, true, 64, 4});
}

INSTANTIATE_TEST_SUITE_P(Each, Decode, ::testing::ValuesIn(available_backends()), backend_name);

}  // namespace
}  // namespace misa::test
