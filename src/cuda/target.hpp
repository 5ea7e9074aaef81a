// SPDX-License-Identifier: Apache-2.0
// The ways of running the indexers on a CUDA device.
#pragma once

#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "misa/context.hpp"

namespace misa::cuda {

struct Target {
  std::string_view name;
  std::string_view isa;
  std::string requirement;
  int priority;
  bool hopper;  // has the kernels for Hopper (sm90*)
};

// By falling priority.
std::span<const Target> targets();

// Whether this build has code of the target's for a compute capability, 10 * major + minor.
bool runs_on(const Target& target, int capability);

// Whether there is a current device, and it can run the target. Says no where there is no driver.
bool available(const Target& target);

// What a plan has to know of a device.
struct Device {
  bool hopper;
  int num_sms;
};

// What a report of a fault should say of the CUDA side.
std::vector<Fact> facts();

// The current device as a target uses it.
Device device_of(const Target& target);

}  // namespace misa::cuda
