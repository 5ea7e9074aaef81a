// SPDX-License-Identifier: Apache-2.0
#include "filter/block_scores.hpp"

#include "cuda/block_mean_products.cuh"
#include "cuda/sm90.hpp"
#include "filter/sm90_fp8_block_scores.hpp"

namespace misa::cuda::filter {

template <class Source>
void launch_block_scores(const ProblemOf<Source>& problem, const DeviceTraits& device,
                         const BlockMeanTable& means, float* scores, std::int64_t stride,
                         cudaStream_t stream) {
  if (sm90_can_implement(problem, device)) {
    launch_block_scores_sm90(problem, means, scores, stride, stream);
    return;
  }
  block_mean_products::launch<block_mean_products::MeansOutput::block_scores>(
      block_mean_products::MeansArguments<Source>{problem, means, 0, nullptr, scores, stride},
      stream);
}

template void launch_block_scores(const Problem&, const DeviceTraits&, const BlockMeanTable&,
                                  float*, std::int64_t, cudaStream_t);
template void launch_block_scores(const PagedProblem&, const DeviceTraits&, const BlockMeanTable&,
                                  float*, std::int64_t, cudaStream_t);

}  // namespace misa::cuda::filter
