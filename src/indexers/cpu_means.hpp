// SPDX-License-Identifier: Apache-2.0
// Routing and the block filter from given block means, on the CPU.
#pragma once

#include "core/means_problem.hpp"
#include "cpu/kernels.hpp"
#include "cpu/threads.hpp"

namespace misa::cpu {

// Heads [T, width] that the pooled router chooses.
void route_from_means(const Kernels& kernels, const MeansProblem& problem, const Threads& threads);

// Blocks [T, width] that the block filter keeps.
void keep_blocks_from_means(const Kernels& kernels, const MeansProblem& problem,
                            const Threads& threads);

}  // namespace misa::cpu
