// SPDX-License-Identifier: Apache-2.0
// The parts of the Python module; bind_config is in config.cpp and so on.
#pragma once

#include <nanobind/nanobind.h>

#include "misa/misa.hpp"

namespace misa::python {

// A misa.Config as the C++ configuration.
IndexerConfig config_of(nanobind::handle config);

void bind_config(nanobind::module_& module);
void bind_plan(nanobind::module_& module);
void bind_device_plan(nanobind::module_& module);
void bind_means(nanobind::module_& module);
void bind_cache(nanobind::module_& module);
void bind_device_cache(nanobind::module_& module);

}  // namespace misa::python
