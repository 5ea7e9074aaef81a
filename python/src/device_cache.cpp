// SPDX-License-Identifier: Apache-2.0
// Writes to the paged key cache in device memory, each on the device of its arrays.
#include <nanobind/stl/string_view.h>

#include "arrays.hpp"
#include "bindings.hpp"
#include "device.hpp"
#include "misa/cuda.hpp"

namespace misa::python {
namespace {

void append_keys(nb::handle cache, nb::handle k, nb::handle slots, std::string_view scale_format,
                 nb::handle page_sums, nb::handle largest_scales, nb::handle sketches, int device,
                 std::uintptr_t stream) {
  const AppendArrays in(cache, k, slots, scale_format, page_sums, largest_scales, sketches,
                        {device});
  const CacheSpan span = in.cache.span();
  const auto at = in.slots.span_of<std::int64_t>();
  const NewKeys keys = in.k ? in.keys() : NewKeys{};
  const nb::gil_scoped_release released;
  require_device(device);
  const OnDevice here(device);
  if (in.k) {
    cuda::append(span, keys, at, reinterpret_cast<void*>(stream), in.format);
  } else {
    cuda::append(span, at, reinterpret_cast<void*>(stream));
  }
}

void rebuild(nb::handle cache, nb::handle page_sums, nb::handle pages, nb::handle filled,
             nb::handle largest_scales, nb::handle sketches, int device, std::uintptr_t stream) {
  const RebuildArrays in(cache, page_sums, pages, filled, largest_scales, sketches, {device});
  const CacheSpan span = in.cache.span();
  const auto numbers = in.pages.span_of<std::int32_t>();
  const auto counts = in.counts();
  const nb::gil_scoped_release released;
  require_device(device);
  const OnDevice here(device);
  cuda::rebuild(span, numbers, counts, reinterpret_cast<void*>(stream));
}

void copy_pages(nb::handle cache, nb::handle from, nb::handle to, nb::handle page_sums,
                nb::handle largest_scales, nb::handle sketches, int device, std::uintptr_t stream) {
  const CopyArrays in(cache, from, to, page_sums, largest_scales, sketches, {device});
  const CacheSpan span = in.cache.span();
  const auto sources = in.from.span_of<std::int32_t>();
  const auto targets = in.to.span_of<std::int32_t>();
  const nb::gil_scoped_release released;
  require_device(device);
  const OnDevice here(device);
  cuda::copy_pages(in.cache.view(), sources, span, targets, reinterpret_cast<void*>(stream));
}

}  // namespace

void bind_device_cache(nb::module_& module) {
  module.def("append_on_device", &append_keys, nb::arg("cache").none(), nb::arg("k").none(),
             nb::arg("slots").none(), nb::arg("scale_format"), nb::arg("page_sums").none(),
             nb::arg("largest_scales").none(), nb::arg("sketches").none(), nb::arg("device"),
             nb::arg("stream"), "Quantises keys into the slots of a cache in device memory.");
  module.def("rebuild_on_device", &rebuild, nb::arg("cache").none(), nb::arg("page_sums").none(),
             nb::arg("pages").none(), nb::arg("filled").none(), nb::arg("largest_scales").none(),
             nb::arg("sketches").none(), nb::arg("device"), nb::arg("stream"),
             "Rebuilds what is derived from pages in device memory.");
  module.def("copy_pages_on_device", &copy_pages, nb::arg("cache").none(), nb::arg("from_").none(),
             nb::arg("to").none(), nb::arg("page_sums").none(), nb::arg("largest_scales").none(),
             nb::arg("sketches").none(), nb::arg("device"), nb::arg("stream"),
             "Copies whole pages in device memory, with what is derived from them.");
}

}  // namespace misa::python
