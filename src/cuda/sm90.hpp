// SPDX-License-Identifier: Apache-2.0
// What the kernels of sm90* for block means and sampled keys are for.
#pragma once

#include "cuda/problem.hpp"
#include "cuda/target.hpp"

namespace misa::cuda {

// Whether the device and the problem are theirs: Hopper, e4m3 queries and keys, D = 128 and at most
// 64 heads.
inline bool sm90_can_implement(const Problem& problem, const Device& device) {
  return device.hopper && problem.q.dtype == DType::e4m3 && problem.k.dtype == DType::e4m3 &&
         problem.q.dim == 128 && problem.q.heads <= 64;
}

}  // namespace misa::cuda
