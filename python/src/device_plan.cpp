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
             std::int64_t total_keys, std::int64_t batch, int max_sms, int device,
             std::string_view backend, std::int64_t workspace_cap)
      : device_(device) {
    require(workspace_cap >= 0, "workspace_cap: expected 0 bytes or more, got {}", workspace_cap);
    require_device(device);
    const OnDevice here(device);
    plan_.emplace(config_of(config),
                  Shape{tokens, heads, dim, max_keys, dtype_by_name("q_dtype", q_dtype),
                        dtype_by_name("k_dtype", k_dtype)},
                  cuda::PlanOptions{total_keys, static_cast<std::size_t>(workspace_cap), backend,
                                    batch, max_sms});
  }

  [[nodiscard]] std::size_t workspace_bytes() const { return plan_->workspace_bytes(); }
  [[nodiscard]] std::string backend() const { return std::string(plan_->backend()); }

  void run_ragged(nb::handle q, nb::handle w, nb::handle k, nb::handle ks, nb::handle ke,
                  nb::handle k_scale, nb::handle indices, nb::handle scores, nb::handle heads,
                  nb::handle residual, nb::handle offsets, nb::handle workspace,
                  std::uintptr_t stream) const {
    const Place place{device_};
    const RaggedArrays in(q, w, k, ks, ke, k_scale, place);
    run(in, {indices, scores, heads, residual, false, offsets, place}, workspace, stream);
  }

  void run_paged(nb::handle q, nb::handle w, nb::handle cache, nb::handle block_table,
                 nb::handle context_lens, nb::handle query_starts, nb::handle page_sums,
                 nb::handle largest_scales, nb::handle sketches, std::int64_t next_n,
                 nb::handle indices, nb::handle scores, nb::handle heads, nb::handle residual,
                 bool slots, nb::handle offsets, nb::handle workspace,
                 std::uintptr_t stream) const {
    const Place place{device_};
    const PagedArrays in(q, w, cache, block_table, context_lens, query_starts, page_sums,
                         largest_scales, sketches, next_n, place);
    run(in, {indices, scores, heads, residual, slots, offsets, place}, workspace, stream);
  }

 private:
  template <class Arrays>
  void run(const Arrays& in, const OutputArrays& out, nb::handle workspace,
           std::uintptr_t stream) const {
    const Output scratch("workspace", workspace, Place{device_});
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

void top_k(nb::handle logits, int count, nb::handle lengths, nb::handle indices, nb::handle scores,
           int device, std::uintptr_t stream) {
  const Place place{device};
  const Array in("logits", logits, nb::dtype<float>(), "[rows, columns]", place);
  const auto of_rows =
      optional_array("lengths", lengths, nb::dtype<std::int32_t>(), "[rows]", place);
  const Array out("indices", indices, nb::dtype<std::int32_t>(), "[rows, top_k]", place,
                  Access::write);
  const auto with =
      optional_array("scores", scores, nb::dtype<float>(), "[rows, top_k]", place, Access::write);
  const std::int64_t rows = in.extent(0);
  const auto require_rows = [&](std::string_view name, const Array& array) {
    require(array.extent(0) == rows && array.extent(1) == count,
            "{}: expected [{}, {}], got [{}, {}]", name, rows, count, array.extent(0),
            array.extent(1));
  };
  require_rows("indices", out);
  if (with) {
    require_rows("scores", *with);
  }
  if (of_rows) {
    require(of_rows->extent(0) == rows && (rows <= 1 || of_rows->stride(0) == 1),
            "lengths: expected {} entries, one a row, got {}", rows, of_rows->extent(0));
  }
  const cuda::Logits from{in.data_of<float>(), rows, in.extent(1), in.stride(0),
                          of_rows ? of_rows->data_of<std::int32_t>() : nullptr};
  const cuda::TopK to{out.writable_data_of<std::int32_t>(),
                      with ? with->writable_data_of<float>() : nullptr, out.stride(0),
                      with ? with->stride(0) : 0};
  const nb::gil_scoped_release released;
  require_device(device);
  const OnDevice here(device);
  cuda::top_k(from, count, to, reinterpret_cast<void*>(stream));
}

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
                    std::string_view, std::string_view, std::int64_t, std::int64_t, int, int,
                    std::string_view, std::int64_t>(),
           nb::arg("config"), nb::arg("tokens"), nb::arg("heads"), nb::arg("dim"),
           nb::arg("max_keys"), nb::arg("q_dtype"), nb::arg("k_dtype"), nb::arg("total_keys"),
           nb::arg("batch"), nb::arg("max_sms"), nb::arg("device"), nb::arg("backend"),
           nb::arg("workspace_cap"))
      .def_prop_ro("workspace_bytes", &DevicePlan::workspace_bytes)
      .def_prop_ro("backend", &DevicePlan::backend)
      .def("run", &DevicePlan::run_ragged, nb::arg("q").none(), nb::arg("w").none(),
           nb::arg("k").none(), nb::arg("ks").none(), nb::arg("ke").none(),
           nb::arg("k_scale").none(), nb::arg("indices").none(), nb::arg("scores").none(),
           nb::arg("heads").none(), nb::arg("residual").none(), nb::arg("offsets").none(),
           nb::arg("workspace").none(), nb::arg("stream"))
      .def("run_paged", &DevicePlan::run_paged, nb::arg("q").none(), nb::arg("w").none(),
           nb::arg("cache").none(), nb::arg("block_table").none(), nb::arg("context_lens").none(),
           nb::arg("query_starts").none(), nb::arg("page_sums").none(),
           nb::arg("largest_scales").none(), nb::arg("sketches").none(), nb::arg("next_n"),
           nb::arg("indices").none(), nb::arg("scores").none(), nb::arg("heads").none(),
           nb::arg("residual").none(), nb::arg("slots"), nb::arg("offsets").none(),
           nb::arg("workspace").none(), nb::arg("stream"));
  module.def("top_k", &top_k, nb::arg("logits").none(), nb::arg("top_k"), nb::arg("lengths").none(),
             nb::arg("indices").none(), nb::arg("scores").none(), nb::arg("device"),
             nb::arg("stream"), "misa::cuda::top_k.");
  module.def("means_workspace_bytes", &cuda::means_workspace_bytes, nb::arg("tokens"),
             nb::arg("dim"), nb::arg("count"),
             "Workspace bytes that the calls on block means need on a device.");
  bind_from_means<&cuda::route_from_means>(module, "route_from_means_on_device", "heads");
  bind_from_means<&cuda::keep_blocks_from_means>(module, "keep_blocks_from_means_on_device",
                                                 "filter_blocks");
}

}  // namespace misa::python
