// SPDX-License-Identifier: Apache-2.0
// Routing by sampled keys (MISA-R): a thread block routes up to 16 consecutive queries.
//
//  1. Queries whose grids begin at the same key with the same stride share the sampled keys, at
//     most 128, as operands in shared memory; scales are kept apart. Rows without a sample are
//     zero.
//  2. A warp computes x = scale * (q . k) of 16 heads of a query with all samples. A lane holds in
//     registers the products of heads g and g + 8 with two of every eight samples.
//  3. A line is fitted to r = max(0, x) by least squares. The sums of d = x - shift, of r, d d and
//     d r give the means, the centred moments and the slope p = Sxr / Sxx; then follows the rms of
//     r - p x - (mean r - p mean x). The shift is the mean of the first 8 samples (4, 2 or 1 if
//     there are fewer). If all x are equal, the shift equals them, so that d and the slope are
//     exactly 0. The shift is never farther from the mean than 4 standard deviations. A lane sums
//     its samples in order, then the quad adds up.
//  4. These, the router and the weight w of a head give the head's value and its coefficient w p.
//  5. A warp per query chooses the heads of largest value, unless heads are fixed or the pooled
//     router has chosen them, and sums the residual row over the other heads, ascending. For e4m3
//     keys the row is rounded with scale max|row| / 448.
//
// So the order of every sum depends only on n, H and D. sm90_fp8_sampled.cu does the same on
// Hopper, for e4m3 queries and keys, where fits are needed.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/heads.cuh"
#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/sm90.hpp"
#include "route/generic_config.cuh"
#include "route/sampled.cuh"
#include "route/sampled.hpp"
#include "route/sm90_fp8_sampled.hpp"

namespace misa::cuda::route {
namespace {

// Step 1. A lane loads 16 bytes of each of several keys, all in flight at once.
template <int dim, bool fp16, class Source>
__device__ void load_samples(SampledShared& shared, SampleRow<dim>* rows, const Source& keys,
                             const SampleGrid& grid) {
  with_dtype(keys.dtype, [&]<DType type>() {
    constexpr int kElements = 16 / static_cast<int>(size_of(type));
    constexpr int kKeyLanes = dim / kElements;
    constexpr int kKeys = kThreads / kKeyLanes;  // loaded at once by the thread block
    constexpr int kLaneKeys = static_cast<int>(kMaxSamples) / kKeys;
    const int first = static_cast<int>(threadIdx.x) / kKeyLanes;
    const int d = static_cast<int>(threadIdx.x) % kKeyLanes * kElements;
    Elements<type, kElements> elements[kLaneKeys];
    float scale[kLaneKeys];
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const int sample = first + i * kKeys;
      elements[i].clear();
      scale[i] = 0;
      if (sample < grid.count) {
        const std::int64_t token = grid.start + (std::int64_t{sample} << grid.shift);
        elements[i].load(key_address<type>(keys, token), d);
        scale[i] = key_scale<type>(keys, token);
      }
    }
#pragma unroll
    for (int i = 0; i < kLaneKeys; ++i) {
      const int sample = first + i * kKeys;
      float squares = 0;
#pragma unroll
      for (int group = 0; group < kElements / 4; ++group) {
        float value[4];
        elements[i].floats(group, value);
        squares = add_squares(squares, value, scale[i]);
#pragma unroll
        for (int part = 0; part < kBf16Parts<type>; ++part) {
          std::uint32_t pairs[2];
          if constexpr (fp16 && type == DType::e4m3) {
            elements[i].fp16(group, pairs);
          } else {
            elements[i].parts(group, part, pairs);
          }
          store_operand(rows[part * kMaxSamples + sample], d + 4 * group, dim, pairs);
        }
      }
      squares = lane_sum<kKeyLanes>(squares);
      if (d == 0) {
        shared.scale[sample] = scale[i];
        shared.squares[sample] = squares;
      }
    }
  });
}

// Step 2.
template <int key_parts, DType type, bool fp16, int dim>
__device__ void multiply_samples(const SampledShared& shared, const SampleRow<dim>* rows,
                                 const HeadOperands<type, fp16, dim, 1>& heads, int count,
                                 SampleProducts& x) {
#pragma unroll
  for (int first = 0; first < kSampleTiles; first += kColumnTiles) {
    float products[kColumnTiles][1][4] = {};
    add_products<key_parts>(heads, rows[first * kMmaColumns], operand_pitch(dim),
                            static_cast<int>(kMaxSamples) * operand_pitch(dim), products);
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        x[4 * (first + i) + k] = products[i][0][k];
      }
    }
  }
  scale_products(shared, count, x);
}

// Steps 2 to 4 for heads first … first + 15 of query t.
template <int key_parts, DType type, bool fp16, int dim, class Source>
__device__ void evaluate_heads(SampledShared& shared, const SampleRow<dim>* rows,
                               const SampledArguments<Source>& arguments, std::int64_t t, int query,
                               int first, Range range) {
  HeadOperands<type, fp16, dim, 1> heads;
  heads.load(arguments.problem.q, t, first);
  float statistic[2] = {};
  head_statistics(arguments, heads, range, statistic);
  LaneFit fit{};
  float kappa = 0;
  if (arguments.fits) {
    const int count = SampleGrid(range).count;
    SampleProducts products;
    multiply_samples<key_parts>(shared, rows, heads, count, products);
    fit = fit_products(products, count, arguments.router != Router::dispersion);
    kappa = key_rms(shared, count, dim);
  }
  float weight[2];
  load_weights(arguments.problem, t, first, weight);
  write_values(shared, arguments, query, first, fit, kappa, statistic, weight);
}

template <class Source, int key_parts, DType type, bool fp16, int dim>
__global__ void __launch_bounds__(kThreads, kBlocksPerSmOf<type>)
    sampled_kernel(const __grid_constant__ SampledArguments<Source> arguments) {
  begin_kernel();
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<SampledShared*>(memory);
  auto* rows = reinterpret_cast<SampleRow<dim>*>(memory + sizeof(SampledShared));
  const ProblemOf<Source>& problem = arguments.problem;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * arguments.queries;
  const int queries = static_cast<int>(min(std::int64_t{arguments.queries}, problem.q.tokens - t0));
  const int query_tasks =
      (static_cast<int>(problem.q.heads) + kMmaHeads - 1) / kMmaHeads;  // of 16 heads
  const int warp = static_cast<int>(threadIdx.x) / 32;

  // Fixed heads need no values; fits are needed only for the residual row.
  const bool evaluating = arguments.fits || arguments.router != Router::fixed;
  for (int first = 0, end = 0; evaluating && first < queries; first = end) {
    SampleGrid grid(visible(problem.k, t0 + first));
    for (end = first + 1; end < queries; ++end) {
      const SampleGrid next(visible(problem.k, t0 + end));
      if (!next.same_keys(grid)) {
        break;
      }
      grid.count = max(grid.count, next.count);
    }
    if (arguments.fits) {
      load_samples<dim, fp16>(shared, rows, problem.k, grid);
    }
    __syncthreads();
    for (int task = warp; task < (end - first) * query_tasks; task += kWarps) {
      const int query = first + task / query_tasks;
      const Range range = visible(problem.k, t0 + query);
      if (range.length > 0) {
        evaluate_heads<key_parts, type, fp16, dim>(shared, rows, arguments, t0 + query, query,
                                                   task % query_tasks * kMmaHeads, range);
      }
    }
    __syncthreads();
  }

  for (int query = warp; query < queries; query += kWarps) {
    write_routing<type, dim, kMaxHeads>(shared, arguments, t0 + query, query);
  }
}

template <int key_parts, DType type, bool fp16, int dim, class Source>
void launch(const SampledArguments<Source>& arguments, cudaStream_t stream) {
  const auto kernel = sampled_kernel<Source, key_parts, type, fp16, dim>;
  const std::size_t bytes = sample_bytes<dim>(arguments.fits ? key_parts : 0);
  const auto grid = static_cast<unsigned>((arguments.problem.q.tokens + arguments.queries - 1) /
                                          arguments.queries);
  launch_kernel("sampled routing", kernel, dim3(grid), kThreads, bytes, stream, arguments);
}

template <int key_parts, DType type, bool fp16, class Source>
void launch(const SampledArguments<Source>& arguments, cudaStream_t stream) {
  if (arguments.problem.q.dim == 64) {
    launch<key_parts, type, fp16, 64>(arguments, stream);
  } else {
    launch<key_parts, type, fp16, 128>(arguments, stream);
  }
}

template <DType type, class Source>
void launch(const SampledArguments<Source>& arguments, cudaStream_t stream) {
  const DType keys = arguments.problem.k.dtype;
  if (type == DType::e4m3 && keys == DType::e4m3) {
    return launch<1, type, type == DType::e4m3>(arguments, stream);
  }
  if constexpr (!kPaged<Source>) {
    if (keys == DType::f32) {
      return launch<kBf16Parts<DType::f32>, type, false>(arguments, stream);
    }
  }
  if constexpr (!kPaged<Source> || type != DType::e4m3) {
    launch<1, type, false>(arguments, stream);
  }
}

}  // namespace

template <class Source>
void launch_sampled(const ProblemOf<Source>& problem, const IndexerConfig& config,
                    const DeviceTraits& device, const Routing& out, cudaStream_t stream) {
  SampledArguments<Source> arguments{};
  arguments.problem = problem;
  arguments.out = out;
  arguments.router = config.router;
  arguments.count = config.heads;
  arguments.residual = config.residual;
  arguments.fits = config.residual || traits_of(config.router).keys == RouterKeys::sampled;
  std::copy(config.static_heads.begin(), config.static_heads.end(), arguments.fixed);
  std::sort(arguments.fixed, arguments.fixed + config.static_heads.size());
  if (arguments.fits && sm90_can_implement(problem, device)) {
    launch_sampled_sm90(arguments, device.num_sms, stream);
    return;
  }
  arguments.queries = thread_block_queries(problem.q.tokens, device.num_sms * kBlocksPerSm);
  switch (problem.q.dtype) {
    case DType::f32: return launch<DType::f32>(arguments, stream);
    case DType::bf16: return launch<DType::bf16>(arguments, stream);
    case DType::e4m3: return launch<DType::e4m3>(arguments, stream);
  }
}

template void launch_sampled(const Problem&, const IndexerConfig&, const DeviceTraits&,
                             const Routing&, cudaStream_t);
template void launch_sampled(const PagedProblem&, const IndexerConfig&, const DeviceTraits&,
                             const Routing&, cudaStream_t);

}  // namespace misa::cuda::route
