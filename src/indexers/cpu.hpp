// SPDX-License-Identifier: Apache-2.0
// A run of the CPU backend.
#pragma once

#include <cstddef>
#include <span>

#include "core/problem.hpp"
#include "cpu/kernels.hpp"
#include "cpu/threads.hpp"
#include "indexers/cpu_workspace.hpp"

namespace misa::cpu {

// Computes a validated problem in a workspace of bytes_of(spec) bytes.
void run(const Kernels& kernels, const Problem& problem, const WorkspaceSpec& spec,
         const Threads& threads, std::span<std::byte> memory);

}  // namespace misa::cpu
