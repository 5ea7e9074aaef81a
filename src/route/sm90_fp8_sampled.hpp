// SPDX-License-Identifier: Apache-2.0
// Sampled routing on Hopper.
#pragma once

#include <cuda_runtime_api.h>

namespace misa::cuda::route {

struct SampledArguments;

// As launch_sampled, for what sm90_can_implement where fits are asked for; `num_sms`: of the
// device.
void launch_sampled_sm90(SampledArguments arguments, int num_sms, cudaStream_t stream);

}  // namespace misa::cuda::route
