// SPDX-License-Identifier: Apache-2.0
// The ways of running the indexers on a CUDA device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <span>
#include <string>
#include <string_view>
#include <vector>

#include "misa/context.hpp"

namespace misa::cuda {

// The matrix products that a way of running uses, beyond those that every device has.
enum class MatrixInstructions : std::uint8_t {
  mma,    // of a warp, compute capability 8.0 and above
  wgmma,  // of a warpgroup, Hopper: the kernels of sm90_*
};

// One way, with what `misa info` says of it.
struct Target {
  std::string_view name;
  std::string_view isa;
  std::string requirement;
  int priority;
  MatrixInstructions matrix;
};

// What plans and launches have to know of a device that a target runs on.
struct DeviceTraits {
  MatrixInstructions matrix;  // which kernels the target uses on it
  std::size_t shared_bytes;   // of shared memory that a thread block may have
  int num_sms;                // multiprocessors
};

// By falling priority.
std::span<const Target> targets();

// Whether this build has code of the target's for an architecture, 10 * major + minor.
bool runs_on(const Target& target, int arch);

// Whether there is a current device, and it can run the target. Says no where there is no driver.
bool available(const Target& target);

// What a report of a fault should say of the CUDA side.
std::vector<Fact> facts();

// The current device as a target uses it.
DeviceTraits traits_of(const Target& target);

}  // namespace misa::cuda
