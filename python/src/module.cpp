// SPDX-License-Identifier: Apache-2.0
// misa._core: the C++ interface for arrays of any framework. The Python package around it defines
// the public names.
#include <nanobind/nanobind.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/string_view.h>
#include <nanobind/stl/vector.h>

#include <fmt/format.h>

#include "bindings.hpp"

namespace nb = nanobind;

namespace misa::python {
namespace {

// A wrong argument is a ValueError, too small a workspace a MemoryError, any other a RuntimeError.
void translate(const std::exception_ptr& pending, void* /*payload*/) {
  try {
    std::rethrow_exception(pending);
  } catch (const Error& error) {
    PyObject* type = error.code() == ErrorCode::invalid_argument ? PyExc_ValueError
                     : error.code() == ErrorCode::workspace      ? PyExc_MemoryError
                                                                 : PyExc_RuntimeError;
    PyErr_SetString(type, error.what());
  }
}

}  // namespace

NB_MODULE(_core, module) {
  nb::register_exception_translator(&translate);
  module.attr("DEFAULT_WORKSPACE_CAP") = kDefaultWorkspaceCap;
  module.def("version", &version, "The library's version, \"major.minor.patch\".");
  nb::class_<BackendInfo>(module, "BackendInfo", "A backend of this build.")
      .def_ro("name", &BackendInfo::name)
      .def_ro("isa", &BackendInfo::isa, "The instruction set that it runs.")
      .def_ro("requirement", &BackendInfo::requirement, "What it needs to run.")
      .def_ro("available", &BackendInfo::available)
      .def_ro("priority", &BackendInfo::priority, "\"auto\" chooses the highest available.")
      .def("__repr__", [](const BackendInfo& info) {
        return fmt::format("<backend {}: {}, {}>", info.name, info.isa,
                           info.available ? "available" : "needs " + info.requirement);
      });
  module.def("backends", &backends,
             "Every backend of this build, in order of decreasing priority.");
  bind_config(module);
  bind_plan(module);
  bind_means(module);
  bind_cache(module);
#if MISA_HAVE_CUDA
  bind_device_cache(module);
  bind_device_plan(module);
#endif
}

}  // namespace misa::python
