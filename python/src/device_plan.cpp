// SPDX-License-Identifier: Apache-2.0
// Selection in device memory: misa::cuda::Plan and the calls on block means, each on the device of
// its arrays.
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>

#include <optional>

#include "arrays.hpp"
#include "bindings.hpp"
#include "device.hpp"
#include "misa/cuda.hpp"

namespace misa::python {
namespace {

class DevicePlan {
 public:
  DevicePlan(nb::handle config, std::int64_t tokens, std::int64_t heads, std::int64_t dim,
             std::int64_t max_keys, std::string_view q_dtype, std::string_view k_dtype,
             std::int64_t total_keys, std::int64_t batch, int device, std::string_view backend,
             std::int64_t workspace_cap)
      : device_(device) {
    require(workspace_cap >= 0, "workspace_cap: expected 0 bytes or more, got {}", workspace_cap);
    require_device(device);
    const OnDevice here(device);
    plan_.emplace(
        config_of(config),
        Shape{tokens, heads, dim, max_keys, dtype_by_name("q_dtype", q_dtype),
              dtype_by_name("k_dtype", k_dtype)},
        cuda::PlanOptions{total_keys, static_cast<std::size_t>(workspace_cap), backend, batch});
  }

  [[nodiscard]] std::size_t workspace_bytes() const { return plan_->workspace_bytes(); }
  [[nodiscard]] std::string backend() const { return std::string(plan_->backend()); }

  void run_ragged(nb::handle q, nb::handle w, nb::handle k, nb::handle ks, nb::handle ke,
                  nb::handle k_scale, nb::handle indices, nb::handle scores, nb::handle heads,
                  nb::handle residual, nb::handle workspace, std::uintptr_t stream) const {
    const RaggedArrays in(q, w, k, ks, ke, k_scale, Place{device_});
    run(in, indices, scores, heads, residual, workspace, stream);
  }

  void run_paged(nb::handle q, nb::handle w, nb::handle cache, nb::handle block_table,
                 nb::handle context_lens, nb::handle query_starts, nb::handle page_sums,
                 nb::handle largest_scales, nb::handle sketches, std::int64_t next_n,
                 nb::handle indices, nb::handle scores, nb::handle heads, nb::handle residual,
                 nb::handle workspace, std::uintptr_t stream) const {
    const PagedArrays in(q, w, cache, block_table, context_lens, query_starts, page_sums,
                         largest_scales, sketches, next_n, Place{device_});
    run(in, indices, scores, heads, residual, workspace, stream);
  }

 private:
  template <class Arrays>
  void run(const Arrays& in, nb::handle indices, nb::handle scores, nb::handle heads,
           nb::handle residual, nb::handle workspace, std::uintptr_t stream) const {
    const Place place{device_};
    const OutputArrays out(indices, scores, heads, residual, place);
    const Output scratch("workspace", workspace, place);
    const auto bytes = std::as_writable_bytes(scratch.span_of<std::uint8_t>());
    const Queries queries = in.queries();
    const Weights weights = in.weights();
    const auto keys = in.keys();
    const Selection selection = out.selection();
    const nb::gil_scoped_release released;
    const OnDevice here(device_);
    plan_->run(queries, weights, keys, selection, bytes, reinterpret_cast<void*>(stream));
  }

  int device_;
  std::optional<cuda::Plan> plan_;  // constructed after its device is made current
};

// `call` is misa::cuda::route_from_means or misa::cuda::keep_blocks_from_means.
template <auto call>
void from_means(nb::handle q, nb::handle w, nb::handle means, nb::handle starts, nb::handle ends,
                nb::handle partial, int width, nb::handle out, nb::handle workspace, int device,
                std::string_view backend, std::uintptr_t stream) {
  const Place place{device};
  const MeansArrays in(q, w, means, starts, ends, partial, place);
  const Output written("out", out, place, nb::dtype<std::int32_t>());
  const Output scratch("workspace", workspace, place);
  const Queries queries = in.queries();
  const Weights weights = in.weights();
  const RaggedMeans view = in.means();
  const auto bytes = std::as_writable_bytes(scratch.span_of<std::uint8_t>());
  const nb::gil_scoped_release released;
  require_device(device);
  const OnDevice here(device);
  call(queries, weights, view, width, written.span_of<std::int32_t>(), bytes,
       reinterpret_cast<void*>(stream), backend);
}

template <auto call>
void bind_from_means(nb::module_& module, const char* name, const char* width) {
  module.def(name, &from_means<call>, nb::arg("q").none(), nb::arg("w").none(),
             nb::arg("means").none(), nb::arg("starts").none(), nb::arg("ends").none(),
             nb::arg("partial").none(), nb::arg(width), nb::arg("out").none(),
             nb::arg("workspace").none(), nb::arg("device"), nb::arg("backend"), nb::arg("stream"));
}

}  // namespace

void bind_device_plan(nb::module_& module) {
  nb::class_<DevicePlan>(module, "DevicePlan", "misa::cuda::Plan: arrays on a CUDA device.")
      .def(nb::init<nb::handle, std::int64_t, std::int64_t, std::int64_t, std::int64_t,
                    std::string_view, std::string_view, std::int64_t, std::int64_t, int,
                    std::string_view, std::int64_t>(),
           nb::arg("config"), nb::arg("tokens"), nb::arg("heads"), nb::arg("dim"),
           nb::arg("max_keys"), nb::arg("q_dtype"), nb::arg("k_dtype"), nb::arg("total_keys"),
           nb::arg("batch"), nb::arg("device"), nb::arg("backend"), nb::arg("workspace_cap"))
      .def_prop_ro("workspace_bytes", &DevicePlan::workspace_bytes)
      .def_prop_ro("backend", &DevicePlan::backend)
      .def("run", &DevicePlan::run_ragged, nb::arg("q").none(), nb::arg("w").none(),
           nb::arg("k").none(), nb::arg("ks").none(), nb::arg("ke").none(),
           nb::arg("k_scale").none(), nb::arg("indices").none(), nb::arg("scores").none(),
           nb::arg("heads").none(), nb::arg("residual").none(), nb::arg("workspace").none(),
           nb::arg("stream"))
      .def("run_paged", &DevicePlan::run_paged, nb::arg("q").none(), nb::arg("w").none(),
           nb::arg("cache").none(), nb::arg("block_table").none(), nb::arg("context_lens").none(),
           nb::arg("query_starts").none(), nb::arg("page_sums").none(),
           nb::arg("largest_scales").none(), nb::arg("sketches").none(), nb::arg("next_n"),
           nb::arg("indices").none(), nb::arg("scores").none(), nb::arg("heads").none(),
           nb::arg("residual").none(), nb::arg("workspace").none(), nb::arg("stream"));
  module.def("means_workspace_bytes", &cuda::means_workspace_bytes, nb::arg("tokens"),
             nb::arg("dim"), nb::arg("count"),
             "Workspace bytes that the calls on block means need on a device.");
  bind_from_means<&cuda::route_from_means>(module, "route_from_means_on_device", "heads");
  bind_from_means<&cuda::keep_blocks_from_means>(module, "keep_blocks_from_means_on_device",
                                                 "filter_blocks");
}

}  // namespace misa::python
