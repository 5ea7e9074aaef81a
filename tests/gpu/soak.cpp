// SPDX-License-Identifier: Apache-2.0
// Replays captured decode steps while the sequences of servers grow, end, rewind and share pages
// under them: between two replays pages are copied and keys appended on the device, and block
// tables, lengths and queries change. Every row that is of a sequence is compared, bit for bit,
// with its row of a prefill, and a sample of rows is judged against the reference. Some graphs have
// lengths by row, write slots or use few multiprocessors, and the derived data of every other step
// are those of a rebuild.
//
//   misa_tests_soak [--replays N] [--seed S] [--seconds S]
//
// Ends with status 1 at the first difference, error or hang, and says how to make it again.
#include <cuda_runtime_api.h>
#include <fmt/format.h>

#include <CLI/App.hpp>
#include <CLI/Config.hpp>
#include <CLI/Formatter.hpp>
#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <map>
#include <memory>
#include <optional>
#include <random>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "common.hpp"
#include "decode.hpp"
#include "misa/cuda.hpp"
#include "support/server.hpp"

namespace misa::test {
namespace {

using Clock = std::chrono::steady_clock;
using std::chrono::seconds;

struct Options {
  std::int64_t replays = 100000;
  std::uint64_t seed = std::random_device()();
  std::int64_t seconds = 3600;  // all replays take less
  std::int64_t judged = 500;    // replays of which a row is judged against the reference
};

// A server and how its device is set up.
struct Setup {
  std::string name;
  DocumentsSpec documents;
  ServerSpec server;
  bool tail;  // pages carry sums and largest scales
  std::int64_t planned_keys;
  int top_k;
  int heads;
  int sketch = 0;  // bits of the sketches in the tails, or 0
};

std::vector<Setup> setups() {
  std::vector<Setup> all;
  Setup setup;
  setup.name = "one sequence";
  setup.documents = {{{3000, 3000}, {700, 700}}, 64, 128};
  setup.server = {1, 1, true, false, 64};
  setup.tail = false;
  setup.planned_keys = 1 << 20;
  setup.top_k = 512;
  setup.heads = 8;
  all.push_back(setup);

  setup.name = "a batch";
  setup.documents = {{{2500, 2500}, {600, 600}, {40, 40}}, 8, 128};
  setup.server = {32, 1, true, false, 64};
  setup.tail = true;
  setup.planned_keys = 4096;
  setup.top_k = 48;
  setup.heads = 2;
  setup.sketch = 2;
  all.push_back(setup);

  setup.name = "drafts";
  setup.documents = {{{1500, 1500}, {2300, 400}}, 32, 128, DType::e4m3, ScaleFormat::ue8m0};
  setup.server = {8, 4, true, false, 128};
  setup.planned_keys = 30000;
  setup.top_k = 64;
  setup.heads = 3;
  setup.sketch = 4;
  all.push_back(setup);

  setup.name = "different numbers of drafts";
  setup.documents = {{{1500, 1500}, {130, 130}}, 6, 64, DType::bf16};
  setup.server = {6, 5, false, false, 32};
  setup.tail = false;
  setup.sketch = 0;
  setup.planned_keys = 2000;
  setup.top_k = 48;
  setup.heads = 2;
  all.push_back(setup);

  setup.name = "long";
  setup.documents = {{{20000, 400}, {33000, 300}}, 8, 128};
  setup.server = {3, 2, true, false, 64};
  setup.tail = true;
  setup.sketch = 2;
  setup.planned_keys = 1 << 18;
  setup.top_k = 256;
  setup.heads = 2;
  all.push_back(setup);
  return all;
}

template <class T>
void upload(const Guarded<T>& array, std::span<const T> values, cudaStream_t stream) {
  if (values.empty()) {
    return;
  }
  expect_success(cudaMemcpyAsync(array.data(), values.data(), values.size_bytes(),
                                 cudaMemcpyHostToDevice, stream));
}

template <class T>
void poison(std::span<T> output, cudaStream_t stream) {
  if (output.empty()) {
    return;
  }
  expect_success(cudaMemsetAsync(output.data(), 0xAA, output.size_bytes(), stream));
}

// How a graph makes its call; what it selects is the same.
struct Form {
  bool row_lens = false;
  bool slots = false;
  int max_sms = 0;

  [[nodiscard]] std::string name() const {
    return fmt::format("{}{}{}", row_lens ? ", lengths by row" : "", slots ? ", slots" : "",
                       max_sms > 0 ? fmt::format(", {} multiprocessors", max_sms) : "");
  }
};

// Every combination comes in turn.
Form form_of(std::size_t graph) {
  return {graph % 2 == 1, graph / 2 % 2 == 1, graph / 4 % 2 == 1 ? 17 : 0};
}

// One indexer's step, captured, and what it has to select.
class Captured {
 public:
  Captured(NamedConfig named, const Form& form, const std::string& backend, const Setup& setup,
           const Pack& whole)
      : named_(std::move(named)),
        form_(form),
        rows_(setup.server.sequences * setup.server.rows),
        plan_(named_.config,
              {rows_, setup.documents.heads, setup.documents.dim, setup.planned_keys,
               setup.documents.q_dtype, DType::e4m3},
              options(form, backend, setup)),
        outputs_(named_.config, rows_, setup.documents.dim),
        prefill_(run(context_for(backend), named_.config, RaggedInputs(whole))) {}
  ~Captured() {
    cudaGraphExecDestroy(executable_);
    cudaGraphDestroy(graph_);
  }
  Captured(const Captured&) = delete;
  Captured& operator=(const Captured&) = delete;

  [[nodiscard]] const NamedConfig& named() const { return named_; }
  [[nodiscard]] const Form& form() const { return form_; }
  [[nodiscard]] std::size_t workspace_bytes() const { return plan_.workspace_bytes(); }
  [[nodiscard]] const Selected& prefill() const { return prefill_; }

  void capture(const Queries& q, const Weights& w, const PagedKeys& keys,
               std::span<std::byte> workspace, cudaStream_t stream) {
    const auto enqueue = [&] {
      plan_.run(q, w, keys, selection(), workspace.first(workspace_bytes()), stream);
    };
    enqueue();  // loads the kernels
    EXPECT_TRUE(ends(stream));
    expect_success(cudaStreamBeginCapture(stream, cudaStreamCaptureModeGlobal));
    enqueue();
    expect_success(cudaStreamEndCapture(stream, &graph_));
    expect_success(cudaGraphInstantiate(&executable_, graph_, 0));
  }

  void replay(cudaStream_t stream) const {
    const Selection out = selection();
    poison(out.indices, stream);
    poison(out.scores, stream);
    poison(out.heads, stream);
    poison(out.residual, stream);
    expect_success(cudaGraphLaunch(executable_, stream));
  }

  [[nodiscard]] Selected result() const { return outputs_.read(); }

 private:
  static cuda::PlanOptions options(const Form& form, const std::string& backend,
                                   const Setup& setup) {
    cuda::PlanOptions options;
    options.batch = setup.server.sequences;
    options.backend = backend;
    options.max_sms = form.max_sms;
    return options;
  }

  [[nodiscard]] Selection selection() const {
    Selection out = outputs_.of({0, static_cast<std::size_t>(rows_)});
    out.slots = form_.slots;
    return out;
  }

  NamedConfig named_;
  Form form_;
  std::int64_t rows_;
  cuda::Plan plan_;
  Outputs outputs_;
  Selected prefill_;
  cudaGraph_t graph_ = nullptr;
  cudaGraphExec_t executable_ = nullptr;
};

// A server whose cache is on the device, and a graph for each indexer. The graphs share a
// workspace, as the layers of a model do.
class Engine {
 public:
  Engine(const Setup& setup, std::string backend, cudaStream_t stream)
      : setup_(setup),
        backend_(std::move(backend)),
        stream_(stream),
        documents_(setup.documents),
        whole_(documents_.whole()),
        server_(documents_, setup.server),
        cache_(server_, dim(), setup.tail, setup.sketch),
        rows_(static_cast<std::size_t>(setup.server.sequences * setup.server.rows)),
        q_(rows_ * q_width()),
        w_(rows_ * heads()),
        block_table_(static_cast<std::size_t>(setup.server.sequences * server_.max_pages())),
        context_lens_(static_cast<std::size_t>(setup.server.sequences)),
        query_starts_(context_lens_.span().size() + 1),
        row_lens_(rows_),
        from_(static_cast<std::size_t>(server_.pages())),
        to_(from_.span().size()),
        slots_(static_cast<std::size_t>(setup.server.sequences * server_.max_keys())),
        keys_(slots_.span().size() * static_cast<std::size_t>(dim())),
        touched_(from_.span().size()),
        filled_(from_.span().size()) {
    std::size_t bytes = 0;
    std::vector<NamedConfig> configs = named_configs(setup.top_k, setup.heads);
    if (setup.sketch != 0) {
      for (const NamedConfig& named : sketched_configs(setup.top_k, setup.heads, setup.sketch)) {
        configs.push_back(named);
      }
    }
    for (const NamedConfig& named : configs) {
      graphs_.push_back(
          std::make_unique<Captured>(named, form_of(graphs_.size()), backend_, setup_, whole_));
      bytes = std::max(bytes, graphs_.back()->workspace_bytes());
    }
    workspace_.emplace(bytes);
    for (const std::unique_ptr<Captured>& graph : graphs_) {
      graph->capture(queries(), {w_.data(), tokens(), setup_.documents.heads}, paged(graph->form()),
                     workspace_->span(), stream_);
    }
  }

  [[nodiscard]] std::int64_t graphs() const { return std::ssize(graphs_); }
  [[nodiscard]] std::string name(std::int64_t graph) const {
    return fmt::format("{}, {}{}, {}", setup_.name, graphs_[graph]->named().name,
                       graphs_[graph]->form().name(), backend_);
  }

  // The server's next step, selected by one of the graphs. If `judged`, one of its rows is judged
  // too; false if none was.
  bool step(std::int64_t graph, bool judged) {
    const Captured& captured = *graphs_[graph];
    const Step step = server_.next();
    enqueue(step, captured);
    if (!ends(stream_)) {
      throw std::runtime_error("the device hangs");
    }
    Selected result = captured.result();
    if (captured.form().slots) {
      make_positions(step, result);
    }
    workspace_->expect_red_zones();
    std::vector<std::int64_t> rows = step.rows;
    rows.resize(rows_, kEmptyRow);  // the others are of no sequence
    EXPECT_TRUE(same_rows(captured.prefill(), rows, result));
    return judged && judge(captured, rows, result);
  }

 private:
  [[nodiscard]] std::int64_t dim() const { return setup_.documents.dim; }
  [[nodiscard]] std::size_t heads() const {
    return static_cast<std::size_t>(setup_.documents.heads);
  }
  [[nodiscard]] std::size_t q_width() const {
    return heads() * static_cast<std::size_t>(dim()) * size_of(setup_.documents.q_dtype);
  }
  [[nodiscard]] std::int64_t page_size() const { return setup_.server.page_size; }
  [[nodiscard]] std::int64_t tokens() const { return static_cast<std::int64_t>(rows_); }

  [[nodiscard]] Queries queries() const {
    return {q_.data(), setup_.documents.q_dtype, tokens(), setup_.documents.heads, dim()};
  }

  [[nodiscard]] PagedKeys paged(const Form& form) const {
    PagedKeys keys;
    keys.cache = cache_.view();
    keys.block_table = block_table_.data();
    keys.max_pages = server_.max_pages();
    if (form.row_lens) {
      keys.row_lens = row_lens_.span();
    } else {
      keys.context_lens = context_lens_.span();
    }
    if (setup_.server.equal_rows) {
      keys.next_n = setup_.server.rows;
    } else {
      keys.query_starts = query_starts_.span();
    }
    return keys;
  }

  void enqueue(const Step& step, const Captured& captured) {
    upload<std::int32_t>(from_, step.from, stream_);
    upload<std::int32_t>(to_, step.to, stream_);
    cuda::copy_pages(cache_.view(), from_.span().first(step.from.size()), cache_.span(),
                     to_.span().first(step.to.size()), stream_);
    upload<std::int64_t>(slots_, step.slots, stream_);
    upload<float>(keys_, step.keys, stream_);
    append(step);
    upload<std::int32_t>(block_table_, step.block_table, stream_);
    upload<std::int32_t>(context_lens_, step.context_lens, stream_);
    upload<std::int32_t>(query_starts_, step.query_starts, stream_);
    upload<std::int32_t>(row_lens_, row_lens(step), stream_);
    std::vector<std::byte> q;
    std::vector<float> w;
    for (const std::int64_t row : step.rows) {
      const auto source = static_cast<std::size_t>(std::max<std::int64_t>(row, 0));
      const std::span q_row = std::span(whole_.q).subspan(source * q_width(), q_width());
      const std::span w_row = std::span(whole_.w).subspan(source * heads(), heads());
      q.insert(q.end(), q_row.begin(), q_row.end());
      w.insert(w.end(), w_row.begin(), w_row.end());
    }
    upload<std::byte>(q_, q, stream_);
    upload<float>(w_, w, stream_);
    captured.replay(stream_);
  }

  // Every other time what is derived from the keys is left to a rebuild of their pages.
  void append(const Step& step) {
    CacheSpan written = cache_.span();
    rebuilds_ = !rebuilds_ && (written.page_sums != nullptr || written.sketch != nullptr);
    if (rebuilds_) {
      written.page_sums = written.largest_scales = nullptr;
      written.sketch = nullptr;
      written.sketch_bits = 0;
    }
    cuda::append(written, {keys_.data(), DType::f32, std::ssize(step.slots), dim()},
                 slots_.span().first(step.slots.size()), stream_, setup_.documents.format);
    if (rebuilds_) {
      std::map<std::int32_t, std::int32_t> tokens;  // of each page, up to the last appended
      for (const std::int64_t slot : step.slots) {
        std::int32_t& count = tokens[static_cast<std::int32_t>(slot / page_size())];
        count = std::max(count, static_cast<std::int32_t>(slot % page_size()) + 1);
      }
      std::vector<std::int32_t> pages;
      std::vector<std::int32_t> filled;
      for (const auto& [page, count] : tokens) {
        pages.push_back(page);
        filled.push_back(count);
      }
      upload<std::int32_t>(touched_, pages, stream_);
      upload<std::int32_t>(filled_, filled, stream_);
      cuda::rebuild(cache_.span(), touched_.span().first(pages.size()),
                    filled_.span().first(pages.size()), stream_);
    }
  }

  // The rows of a step, after which there are some that are of no sequence.
  std::vector<std::int32_t> row_lens(const Step& step) const {
    std::vector<std::int32_t> lens;
    for (std::size_t b = 0; b < step.context_lens.size(); ++b) {
      for (std::int32_t t = step.query_starts[b]; t < step.query_starts[b + 1]; ++t) {
        lens.push_back(step.context_lens[b] - (step.query_starts[b + 1] - 1 - t));
      }
    }
    lens.resize(rows_, 0);
    return lens;
  }

  // Makes positions of slots, and of a slot that the sequence does not have what no position is.
  void make_positions(const Step& step, Selected& result) const {
    for (std::size_t b = 0; b < step.context_lens.size(); ++b) {
      const auto table =
          step.block_table.begin() + static_cast<std::ptrdiff_t>(b) * server_.max_pages();
      const auto end = table + server_.max_pages();
      for (std::int64_t i = step.query_starts[b] * result.top_k;
           i < step.query_starts[b + 1] * result.top_k; ++i) {
        std::int32_t& index = result.indices[i];
        if (index >= 0) {
          const auto page = std::find(table, end, index / page_size());
          index =
              page == end
                  ? -2
                  : static_cast<std::int32_t>((page - table) * page_size() + index % page_size());
        }
      }
    }
  }

  // Judges a row, another one each time.
  bool judge(const Captured& captured, const std::vector<std::int64_t>& rows,
             const Selected& result) {
    for (std::size_t i = 0; i < rows.size(); ++i) {
      const std::int64_t t = static_cast<std::int64_t>((judged_ + i) % rows.size());
      if (rows[t] >= 0) {
        EXPECT_TRUE(valid(captured.named().config, RaggedInputs(documents_.part(rows[t])),
                          slice(result, {t, 1}), backend_));
        ++judged_;
        return true;
      }
    }
    return false;
  }

  Setup setup_;
  std::string backend_;
  cudaStream_t stream_;
  Documents documents_;
  Pack whole_;
  Server server_;
  DeviceCache cache_;
  std::size_t rows_;
  Guarded<std::byte> q_;
  Guarded<float> w_;
  Guarded<std::int32_t> block_table_;
  Guarded<std::int32_t> context_lens_;
  Guarded<std::int32_t> query_starts_;
  Guarded<std::int32_t> row_lens_;
  Guarded<std::int32_t> from_;
  Guarded<std::int32_t> to_;
  Guarded<std::int64_t> slots_;
  Guarded<float> keys_;
  Guarded<std::int32_t> touched_;
  Guarded<std::int32_t> filled_;
  bool rebuilds_ = false;
  std::vector<std::unique_ptr<Captured>> graphs_;
  std::optional<Guarded<std::byte>> workspace_;
  std::size_t judged_ = 0;
};

// The engines of every backend and setup.
std::vector<std::unique_ptr<Engine>> engines(const std::vector<std::string>& backends,
                                             std::mt19937_64& random, cudaStream_t stream) {
  std::vector<std::unique_ptr<Engine>> all;
  for (const std::string& backend : backends) {
    for (Setup setup : setups()) {
      setup.documents.seed = random();
      setup.server.seed = random();
      all.push_back(std::make_unique<Engine>(setup, backend, stream));
    }
  }
  return all;
}

int soak(const Options& options) {
  const Clock::time_point start = Clock::now();
  const auto elapsed = [&] {
    return std::chrono::duration_cast<seconds>(Clock::now() - start).count();
  };
  std::vector<std::string> backends = available_backends();
  std::erase_if(backends, [](const std::string& name) { return !name.starts_with("cuda-"); });
  if (backends.empty()) {
    fmt::print(stderr, "misa_tests_soak: expected a device that can run a CUDA backend\n");
    return 2;
  }
  fmt::print("seed {}\n", options.seed);
  std::mt19937_64 random(options.seed);
  cudaStream_t stream = nullptr;
  expect_success(cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking));
  const std::vector<std::unique_ptr<Engine>> all = engines(backends, random, stream);
  const std::int64_t period = std::max<std::int64_t>(1, options.replays / options.judged);
  std::int64_t judged = 0;
  std::int64_t reported = elapsed();
  for (std::int64_t replay = 0; replay < options.replays; ++replay) {
    Engine& engine = *all[random() % all.size()];
    const auto graph =
        static_cast<std::int64_t>(random() % static_cast<std::uint64_t>(engine.graphs()));
    const auto say = [&](std::string_view what) {
      fmt::print(stderr, "misa_tests_soak: replay {} ({}): {}\nagain: --seed {} --replays {}\n",
                 replay, engine.name(graph), what, options.seed, replay + 1);
    };
    try {
      judged += engine.step(graph, replay % period == 0) ? 1 : 0;
    } catch (const std::exception& error) {
      say(error.what());
      std::fflush(nullptr);
      std::_Exit(1);  // a device that hangs would not let arrays be freed
    }
    if (elapsed() >= options.seconds) {
      say(fmt::format("expected all replays within {} s", options.seconds));
      return 1;
    }
    if (elapsed() >= reported + 10) {
      reported = elapsed();
      fmt::print("{} of {} replays, {} judged, {} s\n", replay + 1, options.replays, judged,
                 reported);
      std::fflush(stdout);
    }
  }
  fmt::print("{} replays as expected, {} judged, {} s\n", options.replays, judged, elapsed());
  return 0;
}

}  // namespace
}  // namespace misa::test

int main(int argc, char** argv) {
  misa::test::Options options;
  CLI::App app("Replays captured decode steps while the pages of their cache change");
  app.add_option("--replays", options.replays, "how many")->check(CLI::PositiveNumber);
  app.add_option("--seed", options.seed, "of all choices; a random one by default");
  app.add_option("--seconds", options.seconds, "the most that all replays may take")
      ->check(CLI::PositiveNumber);
  app.add_option("--judged", options.judged, "of how many a row is judged against the reference")
      ->check(CLI::PositiveNumber);
  CLI11_PARSE(app, argc, argv);
  // Checks that fail are exceptions here.
  testing::InitGoogleTest();
  GTEST_FLAG_SET(throw_on_failure, true);
  try {
    return misa::test::soak(options);
  } catch (const std::exception& error) {
    fmt::print(stderr, "misa_tests_soak: {}\nagain: --seed {}\n", error.what(), options.seed);
    return 1;
  }
}
