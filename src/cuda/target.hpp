// The ways of running the indexers on a CUDA device.
#pragma once

#include <span>
#include <string_view>

namespace misa::cuda {

struct Target {
  std::string_view name;
  std::string_view isa;
  std::string_view requirement;
  int priority;
  int least_capability;  // 10 * major + minor
  int most_capability;
  bool hopper;  // has the kernels for Hopper (sm90*)
};

// By falling priority.
std::span<const Target> targets();

// Whether there is a current device, and it can run the target. Says no where there is no driver.
bool available(const Target& target);

// What a plan has to know of a device.
struct Device {
  bool hopper;
  int processors;
};

// The current device as a target uses it.
Device device_of(const Target& target);

}  // namespace misa::cuda
