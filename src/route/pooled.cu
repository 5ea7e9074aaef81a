// SPDX-License-Identifier: Apache-2.0
#include "route/pooled.hpp"

#include "cuda/block_mean_products.cuh"
#include "cuda/sm90.hpp"
#include "route/sm90_fp8_pooled.hpp"

namespace misa::cuda::route {

void launch_pooled(const Problem& problem, const DeviceTraits& device, const BlockMeanTable& means,
                   std::int32_t count, std::int32_t* heads, cudaStream_t stream) {
  if (sm90_can_implement(problem, device)) {
    launch_pooled_sm90(problem, means, count, heads, device.num_sms, stream);
    return;
  }
  block_mean_products::launch<block_mean_products::MeansOutput::head_energies>(
      {problem, means, count, heads, nullptr, 0}, stream);
}

}  // namespace misa::cuda::route
