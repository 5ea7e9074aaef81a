// SPDX-License-Identifier: Apache-2.0
// Sampled routing on Hopper, for e4m3 queries and keys.
#pragma once

#include <cuda_runtime_api.h>

namespace misa::cuda::route {

struct SampledArguments;

// Does what launch_sampled does, for problems that sm90_can_implement() accepts and with
// arguments.fits set. `num_sms`: the number of SMs of the device.
void launch_sampled_sm90(SampledArguments arguments, int num_sms, cudaStream_t stream);

}  // namespace misa::cuda::route
