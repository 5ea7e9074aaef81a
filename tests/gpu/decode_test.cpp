// SPDX-License-Identifier: Apache-2.0
// Decoding from a paged cache on the device, whose pages are written, copied, freed and reused,
// selects, bit for bit, what a prefill of the same tokens selects: one of ragged keys, and one of
// the pages in chunks.
#include <cuda_runtime_api.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "common.hpp"
#include "decode.hpp"
#include "misa/cuda.hpp"
#include "support/server.hpp"

namespace misa::test {
namespace {

template <class T>
Part append_to(std::vector<T>& whole, const std::vector<T>& values, std::size_t width = 1) {
  const Part part{whole.size() / width, values.size() / width};
  whole.insert(whole.end(), values.begin(), values.end());
  return part;
}

// The steps of a server until it is done. Their arrays stand one after the other, so that a step
// needs no copy between host and device.
struct Script {
  struct Entry {
    Part moves;
    Part keys;
    Part table;
    Part lens;
    Part starts;
    Part rows;
  };

  std::vector<Entry> entries;
  std::vector<std::int32_t> from;
  std::vector<std::int32_t> to;
  std::vector<std::int64_t> slots;
  std::vector<float> keys;
  std::vector<std::int32_t> block_tables;
  std::vector<std::int32_t> context_lens;
  std::vector<std::int32_t> query_starts;
  std::vector<std::int64_t> rows;

  explicit Script(Server& server) {
    while (!server.done()) {
      const Step step = server.next();
      append_to(to, step.to);
      append_to(keys, step.keys);
      entries.push_back({append_to(from, step.from), append_to(slots, step.slots),
                         append_to(block_tables, step.block_table),
                         append_to(context_lens, step.context_lens),
                         append_to(query_starts, step.query_starts), append_to(rows, step.rows)});
    }
  }
};

// The queries and weights of rows of a pack, in device memory.
class DeviceQueries {
 public:
  DeviceQueries(const Pack& whole, const std::vector<std::int64_t>& rows)
      : dtype_(whole.spec.q_dtype),
        heads_(whole.spec.heads),
        dim_(whole.spec.dim),
        q_(rows.size() * static_cast<std::size_t>(heads_ * dim_) * size_of(dtype_)),
        w_(rows.size() * static_cast<std::size_t>(heads_)) {
    std::vector<std::byte> q;
    std::vector<float> w;
    const auto width = static_cast<std::int64_t>(heads_ * dim_ * size_of(dtype_));
    for (const std::int64_t row : rows) {
      const std::int64_t source = std::max<std::int64_t>(row, 0);
      q.insert(q.end(), whole.q.begin() + source * width, whole.q.begin() + (source + 1) * width);
      w.insert(w.end(), whole.w.begin() + source * heads_, whole.w.begin() + (source + 1) * heads_);
    }
    q_.write(q);
    w_.write(w);
  }

  [[nodiscard]] Queries q(Part rows) const {
    const std::size_t width = static_cast<std::size_t>(heads_ * dim_) * size_of(dtype_);
    return {q_.data() + rows.first * width, dtype_, static_cast<std::int64_t>(rows.count), heads_,
            dim_};
  }
  [[nodiscard]] Weights w(Part rows) const {
    return {w_.data() + rows.first * static_cast<std::size_t>(heads_),
            static_cast<std::int64_t>(rows.count), heads_};
  }

 private:
  DType dtype_;
  std::int64_t heads_;
  std::int64_t dim_;
  Guarded<std::byte> q_;
  Guarded<float> w_;
};

struct Case {
  const DocumentsSpec& documents;
  const ServerSpec& server;
  bool tail;                  // pages carry sums and largest scales
  std::int64_t planned_keys;  // at least as many as the longest sequence has
};

class DeviceDecode : public EachCudaBackend {
 protected:
  void expect_prefill(const Case& test, const std::vector<NamedConfig>& configs) const {
    const Documents documents(test.documents);
    const Pack whole = documents.whole();
    Server server(documents, test.server);
    const Script script(server);
    const Steps steps(script, whole);
    for (const NamedConfig& named : configs) {
      const DeviceCache cache(server, test.documents.dim, test.tail, named.config.sketch);
      const Selected prefill = run(context(), named.config, RaggedInputs(whole));
      EXPECT_TRUE(same_rows(prefill, script.rows, decode(test, named.config, server, steps, cache)))
          << named.name;
      const std::vector<std::int64_t> followed = rows_of_document_0(documents);
      EXPECT_TRUE(same_rows(prefill, followed,
                            prefill_chunks(test, named.config, server, steps, cache, followed)))
          << named.name << ", chunks of pages";
    }
  }

 private:
  // A script in device memory.
  struct Steps {
    Steps(const Script& from_script, const Pack& from_documents)
        : script(from_script),
          documents(from_documents),
          queries(documents, script.rows),
          from(script.from),
          to(script.to),
          slots(script.slots),
          keys(script.keys),
          block_tables(script.block_tables),
          context_lens(script.context_lens),
          query_starts(script.query_starts) {}

    const Script& script;
    const Pack& documents;
    DeviceQueries queries;
    Guarded<std::int32_t> from;
    Guarded<std::int32_t> to;
    Guarded<std::int64_t> slots;
    Guarded<float> keys;
    Guarded<std::int32_t> block_tables;
    Guarded<std::int32_t> context_lens;
    Guarded<std::int32_t> query_starts;
  };

  [[nodiscard]] cuda::Plan plan(const Case& test, const IndexerConfig& config,
                                std::int64_t tokens) const {
    cuda::PlanOptions options;
    options.batch = test.server.sequences;
    options.backend = GetParam();
    return cuda::Plan(config,
                      {tokens, test.documents.heads, test.documents.dim, test.planned_keys,
                       test.documents.q_dtype, DType::e4m3},
                      options);
  }

  // All steps, without waiting between them.
  [[nodiscard]] Selected decode(const Case& test, const IndexerConfig& config, const Server& server,
                                const Steps& steps, const DeviceCache& cache) const {
    const auto dim = static_cast<std::size_t>(test.documents.dim);
    const cuda::Plan plan = this->plan(test, config, test.server.sequences * test.server.rows);
    const Guarded<std::byte> workspace(plan.workspace_bytes());
    const Outputs outputs(config, std::ssize(steps.script.rows), test.documents.dim);
    for (const Script::Entry& step : steps.script.entries) {
      cuda::copy_pages(cache.view(), part_of(steps.from, step.moves), cache.span(),
                       part_of(steps.to, step.moves), nullptr);
      const std::span<float> keys = part_of(steps.keys, step.keys, dim);
      cuda::append(
          cache.span(),
          {keys.data(), DType::f32, static_cast<std::int64_t>(step.keys.count), test.documents.dim},
          part_of(steps.slots, step.keys), nullptr, test.documents.format);
      PagedKeys paged;
      paged.cache = cache.view();
      paged.block_table = part_of(steps.block_tables, step.table).data();
      paged.max_pages = server.max_pages();
      paged.context_lens = part_of(steps.context_lens, step.lens);
      if (test.server.equal_rows) {
        paged.next_n = test.server.rows;
      } else {
        paged.query_starts = part_of(steps.query_starts, step.starts);
      }
      plan.run(steps.queries.q(step.rows), steps.queries.w(step.rows), paged, outputs.of(step.rows),
               workspace.span(), nullptr);
    }
    expect_success(cudaDeviceSynchronize());
    workspace.expect_red_zones();
    return outputs.read();
  }

  static std::vector<std::int64_t> rows_of_document_0(const Documents& documents) {
    std::vector<std::int64_t> rows;
    for (std::int64_t i = 0; i < documents.spec().documents[0].keys; ++i) {
      rows.push_back(documents.row(0, i));
    }
    return rows;
  }

  // The document that sequence 0 has decoded, from its pages, by chunks of these sizes.
  [[nodiscard]] Selected prefill_chunks(const Case& test, const IndexerConfig& config,
                                        const Server& server, const Steps& steps,
                                        const DeviceCache& cache,
                                        const std::vector<std::int64_t>& rows) const {
    const DeviceQueries queries(steps.documents, rows);
    const cuda::Plan plan = this->plan(test, config, std::ssize(rows));
    const Guarded<std::byte> workspace(plan.workspace_bytes());
    const Outputs outputs(config, std::ssize(rows), test.documents.dim);
    const std::size_t sizes[]{1, 63, 700, rows.size()};
    std::size_t first = 0;
    for (const std::size_t size : sizes) {
      const Part chunk{first, std::min(size, rows.size() - first)};
      first += chunk.count;
      const std::vector<std::int32_t> ends{static_cast<std::int32_t>(first)};
      const Guarded<std::int32_t> context_lens{std::span<const std::int32_t>(ends)};
      PagedKeys paged;
      paged.cache = cache.view();
      paged.block_table = part_of(steps.block_tables, steps.script.entries.back().table).data();
      paged.max_pages = server.max_pages();
      paged.context_lens = context_lens.span();
      paged.next_n = static_cast<std::int64_t>(chunk.count);
      if (chunk.count > 0) {
        plan.run(queries.q(chunk), queries.w(chunk), paged, outputs.of(chunk), workspace.span(),
                 nullptr);
        expect_success(cudaDeviceSynchronize());
      }
    }
    return outputs.read();
  }
};

// One sequence passes the sizes of pages, groups, blocks and top k; others come and go beside it.
TEST_P(DeviceDecode, TokenByTokenIsPrefill) {
  const DocumentsSpec documents{{{4096, 4096}, {1500, 900}, {300, 300}}, 8, 128};
  std::vector<NamedConfig> all = named_configs(48, 2);
  for (const NamedConfig& sketched : sketched_configs(48, 2)) {
    all.push_back(sketched);
  }
  expect_prefill({documents, {4, 1, true, true, 64, 1}, true, 5000}, all);
}

// The same for as many heads as models have.
TEST_P(DeviceDecode, TokenByTokenIsPrefillWithManyHeads) {
  const DocumentsSpec documents{{{4096, 4096}, {900, 700}}, 64, 128};
  IndexerConfig sketched = IndexerConfig::misa_r(128, 3, 512);
  sketched.sketch = 2;
  expect_prefill({documents, {2, 1, true, true, 64, 9}, true, 1 << 17},
                 {{"dsa", IndexerConfig::dsa(128)},
                  {"misa", IndexerConfig::misa(128, 8)},
                  {"misa-r on a sketch", sketched},
                  {"hisa", IndexerConfig::hisa(128, 128, 4)}});
}

// As many heads as Hopper's kernels take, and rows planned so long that selection splits them.
TEST_P(DeviceDecode, TwoTokensAtOnceArePrefill) {
  const DocumentsSpec documents{
      {{1500, 1500}, {2200, 300}, {300, 300}}, 64, 128, DType::e4m3, ScaleFormat::ue8m0, 2};
  expect_prefill({documents, {5, 2, true, true, 128, 2}, true, 1 << 17}, named_configs(512, 8));
}

TEST_P(DeviceDecode, SketchesAreThoseOfPrefill) {
  const DocumentsSpec documents{{{1700, 1700}, {900, 700}, {300, 300}}, 64, 128};
  expect_prefill({documents, {4, 1, true, true, 64, 6}, true, 5000}, sketched_configs(48, 2));
  expect_prefill({documents, {5, 3, true, true, 128, 7}, true, 1 << 17}, sketched_configs(300, 7));
  const DocumentsSpec narrow{{{600, 600}, {300, 300}}, 9, 64};
  expect_prefill({narrow, {4, 2, true, true, 32, 8}, true, 5000}, sketched_configs(48, 3));
}

TEST_P(DeviceDecode, FourTokensAtOnceArePrefill) {
  const DocumentsSpec documents{{{1300, 1300}, {700, 300}, {300, 300}}, 6, 64, DType::bf16};
  expect_prefill({documents, {6, 4, true, true, 64, 3}, false, 3000}, named_configs(48, 2));
}

// As speculative decoding leaves them.
TEST_P(DeviceDecode, DifferentNumbersOfTokensArePrefill) {
  const DocumentsSpec documents{{{1300, 1300}, {700, 300}, {300, 300}}, 32, 128};
  expect_prefill({documents, {6, 5, false, true, 32, 4}, false, 100000}, named_configs(64, 3));
}

// Few steps: none is waited for, and racecheck's memory grows with the launches that are under way.
TEST_P(DeviceDecode, SmokeAFewTokensArePrefill) {
  const DocumentsSpec documents{{{66, 66}, {200, 70}}, 6, 128};
  IndexerConfig sketched = IndexerConfig::misa_r(24, 2, 48);
  sketched.sketch = 2;
  IndexerConfig every_head = IndexerConfig::dsa(24);
  every_head.candidates = 36;
  every_head.sketch = 4;
  IndexerConfig misa = IndexerConfig::misa(24, 2);
  misa.block = 64;
  expect_prefill({documents, {2, 8, false, true, 64, 5}, true, 300},
                 {{"dsa", IndexerConfig::dsa(24)},
                  {"misa", misa},
                  {"misa-r re-ranked", IndexerConfig::misa_r(24, 2, 48)},
                  {"hisa", IndexerConfig::hisa(24, 64, 3)},
                  {"misa-r on a sketch", sketched},
                  {"every head on a sketch", every_head}});
}

INSTANTIATE_TEST_SUITE_P(Each, DeviceDecode, ::testing::ValuesIn(cuda_backends_of_this_build()),
                         backend_name);

}  // namespace
}  // namespace misa::test
