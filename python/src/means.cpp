// SPDX-License-Identifier: Apache-2.0
// Routing and the block filter from given block means, in host memory.
#include <nanobind/stl/string_view.h>

#include "arrays.hpp"
#include "bindings.hpp"

namespace misa::python {
namespace {

// `call` is misa::route_from_means or misa::keep_blocks_from_means.
template <auto call>
void from_means(nb::handle q, nb::handle w, nb::handle means, nb::handle starts, nb::handle ends,
                nb::handle partial, int width, nb::handle out, std::string_view backend,
                int threads) {
  const MeansArrays in(q, w, means, starts, ends, partial, {});
  const Output written("out", out, {}, nb::dtype<std::int32_t>());
  const Context context({backend, threads});
  const Queries queries = in.queries();
  const Weights weights = in.weights();
  const RaggedMeans view = in.means();
  const nb::gil_scoped_release released;
  call(context, queries, weights, view, width, written.span_of<std::int32_t>());
}

template <auto call>
void bind(nb::module_& module, const char* name, const char* width) {
  module.def(name, &from_means<call>, nb::arg("q").none(), nb::arg("w").none(),
             nb::arg("means").none(), nb::arg("starts").none(), nb::arg("ends").none(),
             nb::arg("partial").none(), nb::arg(width), nb::arg("out").none(), nb::arg("backend"),
             nb::arg("threads"));
}

}  // namespace

void bind_means(nb::module_& module) {
  bind<&misa::route_from_means>(module, "route_from_means", "heads");
  bind<&misa::keep_blocks_from_means>(module, "keep_blocks_from_means", "filter_blocks");
}

}  // namespace misa::python
