// SPDX-License-Identifier: Apache-2.0
// Selection in host memory: plans, and calls that make a plan and run it once.
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <algorithm>

#include "arrays.hpp"
#include "bindings.hpp"
#include "core/workspace.hpp"

namespace misa::python {
namespace {

Context context_of(std::string_view backend, int threads, std::int64_t workspace_cap) {
  require(workspace_cap >= 0, "workspace_cap: expected 0 bytes or more, got {}", workspace_cap);
  return Context({backend, threads, static_cast<std::size_t>(workspace_cap)});
}

// The most keys seen by one query. Entries out of range are refused when the plan runs.
std::int64_t longest(const RaggedKeys& k) {
  std::int64_t most = 0;
  for (std::size_t t = 0; t < std::min(k.starts.size(), k.ends.size()); ++t) {
    most = std::max(most, std::int64_t{k.ends[t]} - k.starts[t]);
  }
  return std::min(most, k.tokens);
}

std::int64_t longest(const PagedKeys& k) {
  std::int64_t most = 0;
  for (const std::int32_t length : k.row_lens.empty() ? k.context_lens : k.row_lens) {
    most = std::max<std::int64_t>(most, length);
  }
  return std::min(most, k.max_pages * k.cache.page_size);
}

class HostPlan {
 public:
  HostPlan(nb::handle config, std::int64_t tokens, std::int64_t heads, std::int64_t dim,
           std::int64_t max_keys, std::string_view q_dtype, std::string_view k_dtype,
           std::string_view backend, int threads, std::int64_t workspace_cap)
      : context_(context_of(backend, threads, workspace_cap)),
        plan_(context_, config_of(config),
              {tokens, heads, dim, max_keys, dtype_by_name("q_dtype", q_dtype),
               dtype_by_name("k_dtype", k_dtype)}) {}

  [[nodiscard]] std::size_t workspace_bytes() const { return plan_.workspace_bytes(); }
  [[nodiscard]] std::string backend() const { return context_.backend(); }

  void run_ragged(nb::handle q, nb::handle w, nb::handle k, nb::handle ks, nb::handle ke,
                  nb::handle k_scale, nb::handle indices, nb::handle scores, nb::handle heads,
                  nb::handle residual, nb::handle offsets, nb::handle workspace) const {
    const RaggedArrays in(q, w, k, ks, ke, k_scale, {});
    run(in, {indices, scores, heads, residual, false, offsets, {}}, workspace);
  }

  void run_paged(nb::handle q, nb::handle w, nb::handle cache, nb::handle block_table,
                 nb::handle context_lens, nb::handle query_starts, nb::handle page_sums,
                 nb::handle largest_scales, nb::handle sketches, std::int64_t next_n,
                 nb::handle indices, nb::handle scores, nb::handle heads, nb::handle residual,
                 bool slots, nb::handle offsets, nb::handle workspace) const {
    const PagedArrays in(q, w, cache, block_table, context_lens, query_starts, page_sums,
                         largest_scales, sketches, next_n, {});
    run(in, {indices, scores, heads, residual, slots, offsets, {}}, workspace);
  }

 private:
  template <class Arrays>
  void run(const Arrays& in, const OutputArrays& out, nb::handle workspace) const {
    const Output scratch("workspace", workspace, {});
    const auto bytes = std::as_writable_bytes(scratch.span_of<std::uint8_t>());
    const Queries queries = in.queries();
    const Weights weights = in.weights();
    const auto keys = in.keys();
    const Selection selection = out.selection();
    const bool given = !workspace.is_none();
    const nb::gil_scoped_release released;
    if (given) {
      plan_.run(queries, weights, keys, selection, bytes);
    } else {
      const OwnWorkspace allocated(plan_.workspace_bytes());
      plan_.run(queries, weights, keys, selection, allocated.span());
    }
  }

  Context context_;
  Plan plan_;
};

// Makes a plan and runs it without the interpreter's lock.
template <class Keys>
void plan_and_run(const Context& context, const IndexerConfig& config, const Queries& q,
                  const Weights& w, const Keys& k, DType k_dtype, const Selection& out) {
  const nb::gil_scoped_release released;
  const Plan plan(context, config, {q.tokens, q.heads, q.dim, longest(k), q.dtype, k_dtype});
  const OwnWorkspace workspace(plan.workspace_bytes());
  plan.run(q, w, k, out, workspace.span());
}

void select(nb::handle config, nb::handle q, nb::handle w, nb::handle k, nb::handle ks,
            nb::handle ke, nb::handle k_scale, nb::handle indices, nb::handle scores,
            nb::handle heads, nb::handle residual, nb::handle offsets, std::string_view backend,
            int threads, std::int64_t workspace_cap) {
  const RaggedArrays in(q, w, k, ks, ke, k_scale, {});
  const OutputArrays out(indices, scores, heads, residual, false, offsets, {});
  const RaggedKeys keys = in.keys();
  plan_and_run(context_of(backend, threads, workspace_cap), config_of(config), in.queries(),
               in.weights(), keys, keys.dtype, out.selection());
}

void select_paged(nb::handle config, nb::handle q, nb::handle w, nb::handle cache,
                  nb::handle block_table, nb::handle context_lens, nb::handle query_starts,
                  nb::handle page_sums, nb::handle largest_scales, nb::handle sketches,
                  std::int64_t next_n, nb::handle indices, nb::handle scores, nb::handle heads,
                  nb::handle residual, bool slots, nb::handle offsets, std::string_view backend,
                  int threads, std::int64_t workspace_cap) {
  const PagedArrays in(q, w, cache, block_table, context_lens, query_starts, page_sums,
                       largest_scales, sketches, next_n, {});
  const OutputArrays out(indices, scores, heads, residual, slots, offsets, {});
  plan_and_run(context_of(backend, threads, workspace_cap), config_of(config), in.queries(),
               in.weights(), in.keys(), DType::e4m3, out.selection());
}

}  // namespace

void bind_plan(nb::module_& module) {
  nb::class_<HostPlan>(module, "HostPlan", "misa::Plan: arrays in host memory.")
      .def(nb::init<nb::handle, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                    std::string_view, std::string_view, std::string_view, int, std::int64_t>(),
           nb::arg("config"), nb::arg("tokens"), nb::arg("heads"), nb::arg("dim"),
           nb::arg("max_keys"), nb::arg("q_dtype"), nb::arg("k_dtype"), nb::arg("backend"),
           nb::arg("threads"), nb::arg("workspace_cap"))
      .def_prop_ro("workspace_bytes", &HostPlan::workspace_bytes)
      .def_prop_ro("backend", &HostPlan::backend)
      .def("run", &HostPlan::run_ragged, nb::arg("q").none(), nb::arg("w").none(),
           nb::arg("k").none(), nb::arg("ks").none(), nb::arg("ke").none(),
           nb::arg("k_scale").none(), nb::arg("indices").none(), nb::arg("scores").none(),
           nb::arg("heads").none(), nb::arg("residual").none(), nb::arg("offsets").none(),
           nb::arg("workspace").none())
      .def("run_paged", &HostPlan::run_paged, nb::arg("q").none(), nb::arg("w").none(),
           nb::arg("cache").none(), nb::arg("block_table").none(), nb::arg("context_lens").none(),
           nb::arg("query_starts").none(), nb::arg("page_sums").none(),
           nb::arg("largest_scales").none(), nb::arg("sketches").none(), nb::arg("next_n"),
           nb::arg("indices").none(), nb::arg("scores").none(), nb::arg("heads").none(),
           nb::arg("residual").none(), nb::arg("slots"), nb::arg("offsets").none(),
           nb::arg("workspace").none());
  module.def("select", &select, nb::arg("config"), nb::arg("q").none(), nb::arg("w").none(),
             nb::arg("k").none(), nb::arg("ks").none(), nb::arg("ke").none(),
             nb::arg("k_scale").none(), nb::arg("indices").none(), nb::arg("scores").none(),
             nb::arg("heads").none(), nb::arg("residual").none(), nb::arg("offsets").none(),
             nb::arg("backend"), nb::arg("threads"), nb::arg("workspace_cap"),
             "Plans and runs on contiguous keys in host memory.");
  module.def("select_paged", &select_paged, nb::arg("config"), nb::arg("q").none(),
             nb::arg("w").none(), nb::arg("cache").none(), nb::arg("block_table").none(),
             nb::arg("context_lens").none(), nb::arg("query_starts").none(),
             nb::arg("page_sums").none(), nb::arg("largest_scales").none(),
             nb::arg("sketches").none(), nb::arg("next_n"), nb::arg("indices").none(),
             nb::arg("scores").none(), nb::arg("heads").none(), nb::arg("residual").none(),
             nb::arg("slots"), nb::arg("offsets").none(), nb::arg("backend"), nb::arg("threads"),
             nb::arg("workspace_cap"), "Plans and runs on a paged cache in host memory.");
}

}  // namespace misa::python
