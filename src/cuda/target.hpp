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

// The most advanced matrix instructions that a target uses.
enum class MatrixInstructions : std::uint8_t {
  mma,    // products of a warp, compute capability 8.0 and above
  wgmma,  // products of a warpgroup, Hopper: the kernels of sm90_*
};

// One such way, with what `misa info` prints about it.
struct Target {
  std::string_view name;
  std::string_view isa;
  std::string requirement;
  int priority;
  MatrixInstructions matrix;
};

// What plans and launches need to know about the device that a target runs on.
struct DeviceTraits {
  MatrixInstructions matrix;  // which kernels the target uses on it
  std::size_t shared_bytes;   // of shared memory that a thread block may have
  int num_sms;                // multiprocessors
};

// By falling priority.
std::span<const Target> targets();

// Whether this build has the target's code for an architecture, given as 10 * major + minor.
bool runs_on(const Target& target, int arch);

// Whether there is a current device that can run the target; false without a driver.
bool available(const Target& target);

// What a bug report should say about CUDA.
std::vector<Fact> facts();

// The traits of the current device for a target.
DeviceTraits traits_of(const Target& target);

}  // namespace misa::cuda
