// SPDX-License-Identifier: Apache-2.0
// Sampled routing on Hopper, for e4m3 queries and keys.
#pragma once

#include <cuda_runtime_api.h>

namespace misa::cuda::route {

struct SampledArguments;

// As launch_sampled, where sm90_can_implement and arguments.fits. `num_sms`: of the device.
void launch_sampled_sm90(SampledArguments arguments, int num_sms, cudaStream_t stream);

}  // namespace misa::cuda::route
