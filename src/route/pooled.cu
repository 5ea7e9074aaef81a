// SPDX-License-Identifier: Apache-2.0
#include "route/pooled.hpp"

#include "cuda/block_mean_products.cuh"
#include "cuda/sm90.hpp"
#include "route/sm90_fp8_pooled.hpp"

namespace misa::cuda::route {

template <class Source>
void launch_pooled(const ProblemOf<Source>& problem, const DeviceTraits& device,
                   const BlockMeanTable& means, std::int32_t count, std::int32_t* heads,
                   cudaStream_t stream) {
  if (sm90_can_implement(problem, device)) {
    launch_pooled_sm90(problem, means, count, heads, device.num_sms, stream);
    return;
  }
  block_mean_products::launch<block_mean_products::MeansOutput::head_energies>(
      block_mean_products::MeansArguments<Source>{problem, means, count, heads, nullptr, 0},
      device.num_sms, stream);
}

template void launch_pooled(const Problem&, const DeviceTraits&, const BlockMeanTable&,
                            std::int32_t, std::int32_t*, cudaStream_t);
template void launch_pooled(const PagedProblem&, const DeviceTraits&, const BlockMeanTable&,
                            std::int32_t, std::int32_t*, cudaStream_t);

}  // namespace misa::cuda::route
