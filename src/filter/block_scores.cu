// SPDX-License-Identifier: Apache-2.0
#include "filter/block_scores.hpp"

#include "cuda/block_mean_products.cuh"
#include "cuda/sm90.hpp"
#include "filter/sm90_fp8_block_scores.hpp"
#include "filter/sm90_fp8_scores_from_sums.hpp"

namespace misa::cuda::filter {

template <class Source>
bool scores_from_sums(const ProblemOf<Source>& problem, const DeviceTraits& device) {
  if constexpr (kPaged<Source>) {
    // Every few queries of a sequence read its sums again, which are twice as long as the means of
    // blocks of 128 keys.
    constexpr std::int64_t kFewQueries = 8;
    return has_sums(problem.k) && sm90_can_implement(problem, device) &&
           problem.q.tokens <= kFewQueries * problem.k.sequences;
  } else {
    return false;
  }
}

template bool scores_from_sums(const Problem&, const DeviceTraits&);
template bool scores_from_sums(const PagedProblem&, const DeviceTraits&);

template <class Source>
void launch_block_scores(const ProblemOf<Source>& problem, const DeviceTraits& device,
                         const BlockMeanTable& means, float* scores, std::int64_t stride,
                         cudaStream_t stream) {
  if constexpr (kPaged<Source>) {
    if (scores_from_sums(problem, device)) {
      launch_scores_from_sums_sm90(problem, means.block, scores, stride, device.num_sms, stream);
      return;
    }
  }
  if (sm90_can_implement(problem, device)) {
    launch_block_scores_sm90(problem, means, scores, stride, device.num_sms, stream);
    return;
  }
  block_mean_products::launch<block_mean_products::MeansOutput::block_scores>(
      block_mean_products::MeansArguments<Source>{problem, means, 0, nullptr, scores, stride},
      device.num_sms, stream);
}

template void launch_block_scores(const Problem&, const DeviceTraits&, const BlockMeanTable&,
                                  float*, std::int64_t, cudaStream_t);
template void launch_block_scores(const PagedProblem&, const DeviceTraits&, const BlockMeanTable&,
                                  float*, std::int64_t, cudaStream_t);

}  // namespace misa::cuda::filter
