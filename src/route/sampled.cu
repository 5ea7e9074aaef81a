// SPDX-License-Identifier: Apache-2.0
// Routing by the sample grid (MISA-R): a block of threads serves up to 16 consecutive queries.
//
//  1. Queries whose grids start at the same key with the same stride share the sampled keys, at
//     most 128, as operands in shared memory, scales apart. Rows up to 128 are zero.
//  2. A warp takes 16 heads of a query and keeps x = scale * (q . k) of all samples in registers: a
//     lane holds heads g and g + 8 and two samples in eight.
//  3. r = max(0, x) and d = x - shift give the sums of d, r, d d and d r, and these give means,
//     centred moments and the slope p = Sxr / Sxx. The shift is the mean of the first 8 samples (4,
//     2 or 1 where there are fewer): exact where x is constant, so that d is 0 and the slope too;
//     and no farther from the mean than 4 standard deviations, whatever x. Then the rms of
//     r - p x - (mean r - p mean x). A lane sums its samples in order, then the four lanes of a
//     head add up.
//  4. From that or from the head alone, what the head is worth; and w p.
//  5. A warp takes a query: chooses its heads, unless they were given, and sums the residual row
//     over the other heads, ascending. Where keys are e4m3 the row is rounded with scale
//     max|row| / 448.
//
// So the order of every sum follows from n, H and D. On Hopper fits of e4m3 queries and keys are
// those of sm90_fp8_sampled.cu.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/heads.cuh"
#include "cuda/launch.cuh"
#include "cuda/range.cuh"
#include "cuda/sm90.hpp"
#include "route/generic_config.cuh"
#include "route/sampled.cuh"
#include "route/sampled.hpp"
#include "route/sm90_fp8_sampled.hpp"

namespace misa::cuda::route {
namespace {

// Step 1. A lane has 16 bytes of a key, and all that it loads is in flight at once.
template <int dim, bool fp16>
__device__ void load_samples(SampleShared& shared, SampleRow<dim>* rows,
                             const SampledArguments& arguments, const Grid& grid) {
  const Keys& keys = arguments.problem.k;
  with_dtype(keys.dtype, [&]<DType type>() {
    constexpr int kElements = 16 / static_cast<int>(size_of(type));
    constexpr int kLanes = dim / kElements;  // of a key
    constexpr int kKeys = kThreads / kLanes;
    constexpr int kTimes = static_cast<int>(kMaxSamples) / kKeys;
    const int first = static_cast<int>(threadIdx.x) / kLanes;
    const int d = static_cast<int>(threadIdx.x) % kLanes * kElements;
    Elements<type, kElements> elements[kTimes];
    float scale[kTimes];
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
      const int sample = first + i * kKeys;
      elements[i].clear();
      scale[i] = 0;
      if (sample < grid.count) {
        const std::int64_t token = grid.start + (std::int64_t{sample} << grid.shift);
        const auto* row = static_cast<const std::byte*>(keys.data) +
                          token * keys.stride * static_cast<std::int64_t>(size_of(type));
        elements[i].load(row, d);
        scale[i] = type == DType::e4m3 ? __ldg(keys.scale + token) : 1.0F;
      }
    }
#pragma unroll
    for (int i = 0; i < kTimes; ++i) {
      const int sample = first + i * kKeys;
      float squares = 0;
#pragma unroll
      for (int four = 0; four < kElements / 4; ++four) {
        float value[4];
        elements[i].floats(four, value);
        squares = add_squares(squares, value, scale[i]);
#pragma unroll
        for (int part = 0; part < kParts<type>; ++part) {
          std::uint32_t pairs[2];
          if constexpr (fp16 && type == DType::e4m3) {
            elements[i].fp16(four, pairs);
          } else {
            elements[i].parts(four, part, pairs);
          }
          store_operand(rows[part * kMaxSamples + sample], d + 4 * four, dim, pairs);
        }
      }
      squares = sum_of_lanes<kLanes>(squares);
      if (d == 0) {
        shared.scale[sample] = scale[i];
        shared.squares[sample] = squares;
      }
    }
  });
}

// Step 2.
template <int key_parts, DType type, bool fp16, int dim>
__device__ void multiply(const SampleShared& shared, const SampleRow<dim>* rows,
                         const HeadRows<type, fp16, dim, 1>& heads, int count, Products& x) {
#pragma unroll
  for (int first = 0; first < kSampleTiles; first += kPair) {
    float products[kPair][1][4] = {};
    add_products<key_parts>(heads, rows[first * kTileKeys], operand_pitch(dim),
                            static_cast<int>(kMaxSamples) * operand_pitch(dim), products);
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
#pragma unroll
      for (int k = 0; k < 4; ++k) {
        x[4 * (first + i) + k] = products[i][0][k];
      }
    }
  }
  scale_products(shared, count, x);
}

// Steps 2 to 4 for the heads from `first` on of query t.
template <int key_parts, DType type, bool fp16, int dim>
__device__ void judge_heads(SampleShared& shared, const SampleRow<dim>* rows,
                            const SampledArguments& arguments, std::int64_t t, int slot, int first,
                            Range range) {
  HeadRows<type, fp16, dim, 1> heads;
  heads.load(arguments.problem.q, t, first);
  float own[2] = {};
  judge_alone(arguments, heads, range, own);
  Fit result{};
  float kappa = 0;
  if (arguments.fits) {
    const int count = Grid(range).count;
    Products products;
    multiply<key_parts>(shared, rows, heads, count, products);
    result = fit(products, count, arguments.router != Router::dispersion);
    kappa = entry_rms(shared, count, dim);
  }
  float weight[2];
  load_weights(arguments.problem, t, first, weight);
  write_values(shared, arguments, slot, first, result, kappa, own, weight);
}

template <int key_parts, DType type, bool fp16, int dim>
__global__ void __launch_bounds__(kThreads, kBlocksPerSmOf<type>)
    sampled_kernel(const __grid_constant__ SampledArguments arguments) {
  begin_kernel();
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<SampleShared*>(memory);
  auto* rows = reinterpret_cast<SampleRow<dim>*>(memory + sizeof(SampleShared));
  const Problem& problem = arguments.problem;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * arguments.queries;
  const int queries = static_cast<int>(min(std::int64_t{arguments.queries}, problem.q.tokens - t0));
  const int groups = (static_cast<int>(problem.q.heads) + kTileHeads - 1) / kTileHeads;
  const int warp = static_cast<int>(threadIdx.x) / 32;

  // Given heads are asked for nothing but their slopes.
  const bool judging = arguments.fits || arguments.router != Router::fixed;
  for (int first = 0, end = 0; judging && first < queries; first = end) {
    Grid grid(visible(problem.k, t0 + first));
    for (end = first + 1; end < queries; ++end) {
      const Grid next(visible(problem.k, t0 + end));
      if (!next.shares(grid)) {
        break;
      }
      grid.count = max(grid.count, next.count);
    }
    if (arguments.fits) {
      load_samples<dim, fp16>(shared, rows, arguments, grid);
    }
    __syncthreads();
    for (int task = warp; task < (end - first) * groups; task += kWarps) {
      const int slot = first + task / groups;
      const Range range = visible(problem.k, t0 + slot);
      if (range.length > 0) {
        judge_heads<key_parts, type, fp16, dim>(shared, rows, arguments, t0 + slot, slot,
                                                task % groups * kTileHeads, range);
      }
    }
    __syncthreads();
  }

  for (int slot = warp; slot < queries; slot += kWarps) {
    finish<type, dim, kMaxHeads>(shared, arguments, t0 + slot, slot);
  }
}

template <int key_parts, DType type, bool fp16, int dim>
void launch(const SampledArguments& arguments, cudaStream_t stream) {
  const auto kernel = sampled_kernel<key_parts, type, fp16, dim>;
  const std::size_t bytes = sample_bytes<dim>(arguments.fits ? key_parts : 0);
  const auto blocks = static_cast<unsigned>((arguments.problem.q.tokens + arguments.queries - 1) /
                                            arguments.queries);
  launch_kernel("sampled routing", kernel, dim3(blocks), kThreads, bytes, stream, arguments);
}

template <int key_parts, DType type, bool fp16>
void launch(const SampledArguments& arguments, cudaStream_t stream) {
  if (arguments.problem.q.dim == 64) {
    launch<key_parts, type, fp16, 64>(arguments, stream);
  } else {
    launch<key_parts, type, fp16, 128>(arguments, stream);
  }
}

template <DType type>
void launch(const SampledArguments& arguments, cudaStream_t stream) {
  const DType keys = arguments.problem.k.dtype;
  if (keys == DType::f32) {
    launch<kParts<DType::f32>, type, false>(arguments, stream);
  } else if (type == DType::e4m3 && keys == DType::e4m3) {
    launch<1, type, type == DType::e4m3>(arguments, stream);
  } else {
    launch<1, type, false>(arguments, stream);
  }
}

}  // namespace

void launch_sampled(const Problem& problem, const IndexerConfig& config, const DeviceTraits& device,
                    const Routing& out, cudaStream_t stream) {
  SampledArguments arguments{};
  arguments.problem = problem;
  arguments.out = out;
  arguments.router = config.router;
  arguments.count = config.heads;
  arguments.residual = config.residual;
  arguments.fits = config.residual || config.router == Router::nonlinearity ||
                   config.router == Router::dispersion;
  std::copy(config.static_heads.begin(), config.static_heads.end(), arguments.fixed);
  std::sort(arguments.fixed, arguments.fixed + config.static_heads.size());
  if (arguments.fits && sm90_can_implement(problem, device)) {
    launch_sampled_sm90(arguments, device.num_sms, stream);
    return;
  }
  arguments.queries = queries_of_block(problem.q.tokens, device.num_sms * kBlocksPerSm);
  switch (problem.q.dtype) {
    case DType::f32: return launch<DType::f32>(arguments, stream);
    case DType::bf16: return launch<DType::bf16>(arguments, stream);
    case DType::e4m3: return launch<DType::e4m3>(arguments, stream);
  }
}

}  // namespace misa::cuda::route
