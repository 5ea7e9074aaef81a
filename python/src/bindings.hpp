// SPDX-License-Identifier: Apache-2.0
// The parts of the module, each bound in the file of its name.
#pragma once

#include <nanobind/nanobind.h>

#include "misa/misa.hpp"

namespace misa::python {

// What a misa.Config says.
IndexerConfig config_of(nanobind::handle config);

void bind_config(nanobind::module_& module);
void bind_plan(nanobind::module_& module);
void bind_device_plan(nanobind::module_& module);
void bind_means(nanobind::module_& module);
void bind_cache(nanobind::module_& module);

}  // namespace misa::python
