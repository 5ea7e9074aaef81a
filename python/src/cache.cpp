// SPDX-License-Identifier: Apache-2.0
// Writes to the paged key cache.
#include <nanobind/stl/string_view.h>

#include "arrays.hpp"
#include "bindings.hpp"

namespace misa::python {
namespace {

ScaleFormat scale_format_of(std::string_view name) {
  require(name == "f32" || name == "ue8m0", "scale_format: expected f32 or ue8m0, got '{}'", name);
  return name == "f32" ? ScaleFormat::f32 : ScaleFormat::ue8m0;
}

}  // namespace

AppendArrays::AppendArrays(nb::handle cache_, nb::handle k_, nb::handle slots_,
                           std::string_view scale_format, nb::handle page_sums,
                           nb::handle largest_scales, nb::handle sketches, Place place)
    : cache(cache_, page_sums, largest_scales, sketches, place, Access::write),
      slots("slots", slots_, nb::dtype<std::int64_t>(), "[N]", place),
      format(scale_format_of(scale_format)) {
  if (!k_.is_none()) {
    k.emplace("k", k_, kElements, "[N, D]", place);
  }
}

NewKeys AppendArrays::keys() const {
  return {k->data(), k->dtype(), k->extent(0), k->extent(1), k->stride(0)};
}

RebuildArrays::RebuildArrays(nb::handle cache_, nb::handle page_sums, nb::handle pages_,
                             nb::handle filled_, nb::handle largest_scales, nb::handle sketches,
                             Place place)
    : cache(cache_, page_sums, largest_scales, sketches, place, Access::write),
      pages("pages", pages_, nb::dtype<std::int32_t>(), "[N]", place),
      filled(optional_array("filled", filled_, nb::dtype<std::int32_t>(), "[N]", place)) {
  require(!filled || filled->extent(0) == pages.extent(0),
          "filled: expected {} entries as pages has, got {}", pages.extent(0),
          filled ? filled->extent(0) : 0);
}

CopyArrays::CopyArrays(nb::handle cache_, nb::handle from_, nb::handle to_, nb::handle page_sums,
                       nb::handle largest_scales, nb::handle sketches, Place place)
    : cache(cache_, page_sums, largest_scales, sketches, place, Access::write),
      from("from_", from_, nb::dtype<std::int32_t>(), "[N]", place),
      to("to", to_, nb::dtype<std::int32_t>(), "[N]", place) {}

std::span<const std::int32_t> RebuildArrays::counts() const {
  return filled ? filled->span_of<std::int32_t>() : std::span<const std::int32_t>();
}

namespace {

void append_keys(nb::handle cache, nb::handle k, nb::handle slots, std::string_view scale_format,
                 nb::handle page_sums, nb::handle largest_scales, nb::handle sketches) {
  const AppendArrays in(cache, k, slots, scale_format, page_sums, largest_scales, sketches, {});
  const CacheSpan span = in.cache.span();
  const auto at = in.slots.span_of<std::int64_t>();
  if (!in.k) {
    const nb::gil_scoped_release released;
    append(span, at);
    return;
  }
  const NewKeys keys = in.keys();
  const nb::gil_scoped_release released;
  append(span, keys, at, in.format);
}

void rebuild(nb::handle cache, nb::handle page_sums, nb::handle pages, nb::handle filled,
             nb::handle largest_scales, nb::handle sketches) {
  const RebuildArrays in(cache, page_sums, pages, filled, largest_scales, sketches, {});
  const CacheSpan span = in.cache.span();
  const auto numbers = in.pages.span_of<std::int32_t>();
  const auto counts = in.counts();
  const nb::gil_scoped_release released;
  rebuild(span, numbers, counts);
}

void copy_pages(nb::handle cache, nb::handle from, nb::handle to, nb::handle page_sums,
                nb::handle largest_scales, nb::handle sketches) {
  const CopyArrays in(cache, from, to, page_sums, largest_scales, sketches, {});
  const CacheSpan span = in.cache.span();
  const auto sources = in.from.span_of<std::int32_t>();
  const auto targets = in.to.span_of<std::int32_t>();
  const nb::gil_scoped_release released;
  copy_pages(in.cache.view(), sources, span, targets);
}

}  // namespace

void bind_cache(nb::module_& module) {
  module.def("append", &append_keys, nb::arg("cache").none(), nb::arg("k").none(),
             nb::arg("slots").none(), nb::arg("scale_format"), nb::arg("page_sums").none(),
             nb::arg("largest_scales").none(), nb::arg("sketches").none(),
             "Quantises keys into the slots of a cache in host memory.");
  module.def("rebuild", &rebuild, nb::arg("cache").none(), nb::arg("page_sums").none(),
             nb::arg("pages").none(), nb::arg("filled").none(), nb::arg("largest_scales").none(),
             nb::arg("sketches").none(), "Rebuilds what is derived from pages from their bytes.");
  module.def("copy_pages", &copy_pages, nb::arg("cache").none(), nb::arg("from_").none(),
             nb::arg("to").none(), nb::arg("page_sums").none(), nb::arg("largest_scales").none(),
             nb::arg("sketches").none(), "Copies whole pages, with what is derived from them.");
  module.def(
      "page_tail",
      [](std::int64_t dim, std::int64_t page_size, int sketch_bits) {
        const PageTail tail = page_tail(dim, page_size, sketch_bits);
        return nb::make_tuple(tail.page_sums, tail.largest_scales, tail.sketch, tail.page_stride);
      },
      nb::arg("dim"), nb::arg("page_size"), nb::arg("sketch_bits"), "The fields of PageTail.");
}

}  // namespace misa::python
