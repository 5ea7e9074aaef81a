// SPDX-License-Identifier: Apache-2.0
// Sampled routing on Hopper, for e4m3 queries and keys.
#pragma once

#include <cuda_runtime_api.h>

namespace misa::cuda::route {

template <class Source>
struct SampledArguments;

// Does what launch_sampled does, for problems that sm90_can_implement() accepts and with
// arguments.fits set. `num_sms`: the number of SMs of the device.
template <class Source>
void launch_sampled_sm90(SampledArguments<Source> arguments, int num_sms, cudaStream_t stream);

}  // namespace misa::cuda::route
