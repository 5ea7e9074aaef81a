// SPDX-License-Identifier: Apache-2.0
// Device functions of both kernels of sampled routing. The steps are those of sampled.cu.
#pragma once

#include <cstdint>

#include "cuda/heads.cuh"
#include "cuda/key_source.cuh"
#include "route/generic_config.cuh"
#include "route/sampled.hpp"

namespace misa::cuda::route {

template <class Source>
struct SampledArguments {
  ProblemOf<Source> problem;
  Routing out;
  Router router;
  std::int32_t count;  // heads to choose
  bool fits;           // the router or the residual row needs fits
  bool residual;
  int queries;                    // per thread block
  std::uint8_t fixed[kMaxHeads];  // Router::fixed: the heads, ascending
};

// Elements of the residual row that a lane sums. Where D = 64, half of the lanes have none.
inline constexpr int kResidualElements = 4;

// Column tiles of sampled keys.
inline constexpr int kSampleTiles = static_cast<int>(kMaxSamples) / kMmaColumns;

// The sampled positions of a query that sees n keys: 0, s, 2 s, … below n, where s = 2^shift is the
// smallest power of two with s >= n / 128.
struct SampleGrid {
  std::int32_t start;  // first key that the query sees
  int shift;
  int count;

  __device__ explicit SampleGrid(Range range) : start(range.start), shift(0), count(0) {
    if (range.length > 0) {
      shift = 32 - __clz((range.length - 1) / static_cast<int>(kMaxSamples));
      count = ((range.length - 1) >> shift) + 1;
    }
  }
  // Whether both grids have the same start and stride, so that the shorter one's keys are the first
  // keys of the longer one.
  __device__ bool same_keys(const SampleGrid& other) const {
    return start == other.start && shift == other.shift;
  }
};

// Adds the squares of some elements of a sampled key to a sum.
template <int count>
__device__ float add_squares(float squares, const float (&value)[count], float scale) {
#pragma unroll
  for (const float element : value) {
    const float scaled = scale * element;
    squares = __fmaf_rn(scaled, scaled, squares);
  }
  return squares;
}

// The products of a lane's heads with its samples: head g + 8 half and sample 8 i + 2 c + e have
// element 4 i + 2 half + e.
using SampleProducts = float[4 * kSampleTiles];

// Fits of a lane's two heads.
struct LaneFit {
  float slope[2];
  float rms[2];  // of the residuals
};

// Step 2: multiplies by the scales of keys. x is 0 from the query's `count` samples on.
__device__ inline void scale_products(const SampledShared& shared, int count, SampleProducts& x) {
  const int c = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int i = 0; i < kSampleTiles; ++i) {
    const int sample = i * kMmaColumns + 2 * c;
    const float2 scales = *reinterpret_cast<const float2*>(&shared.scale[sample]);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float scale = e == 0 ? scales.x : scales.y;
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float product = x[4 * i + 2 * half + e] * scale;
        x[4 * i + 2 * half + e] = sample + e < count ? product : 0;
      }
    }
  }
}

// Step 3. rms is that of the linear fit's residuals if `linear`, else the standard deviation of r.
__device__ inline LaneFit fit_products(const SampleProducts& x, int count, bool linear) {
  const int c = static_cast<int>(threadIdx.x) % 4;
  const auto n = static_cast<float>(count);
  const float inverse_n = 1 / n;
  auto lane_count = static_cast<float>(count - 2 * c);
  // 1 for a sample of the query, 0 after the last one.
  const auto is_sample = [&](int i, int e) {
    return __saturatef(lane_count - static_cast<float>(i * kMmaColumns + e));
  };
  const int shift_count = count >= 8 ? 8 : count >= 4 ? 4 : count >= 2 ? 2 : 1;
  float shift[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 2 * c < shift_count ? x[2 * half] : 0;
    sum += 2 * c + 1 < shift_count ? x[2 * half + 1] : 0;
    shift[half] = quad_sum(sum) * (1 / static_cast<float>(shift_count));
  }
  float sum_d[2] = {};
  float sum_r[2] = {};
  float sum_dd[2] = {};
  float sum_dr[2] = {};
#pragma unroll
  for (int i = 0; i < kSampleTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float d = __fmaf_rn(-shift[half], is_sample(i, e), x[4 * i + 2 * half + e]);
        const float r = max_nan(x[4 * i + 2 * half + e], 0);
        sum_d[half] += d;
        sum_r[half] += r;
        sum_dd[half] = __fmaf_rn(d, d, sum_dd[half]);
        sum_dr[half] = __fmaf_rn(d, r, sum_dr[half]);
      }
    }
  }
  LaneFit result;
  bool constant[2];
  float slope[2];
  float intercept[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float mean_d = quad_sum(sum_d[half]) * inverse_n;
    const float mean_r = quad_sum(sum_r[half]) * inverse_n;
    const float xx = __fmaf_rn(-n * mean_d, mean_d, quad_sum(sum_dd[half]));
    const float xr = __fmaf_rn(-n * mean_d, mean_r, quad_sum(sum_dr[half]));
    // x counts as constant also if its variance underflows, but not if it is NaN.
    constant[half] = xx <= 0;
    result.slope[half] = constant[half] ? 0 : xr / xx;
    slope[half] = linear ? result.slope[half] : 0;
    intercept[half] = __fmaf_rn(-slope[half], shift[half] + mean_d, mean_r);
  }
  // Keeps the compiler from holding all values of is_sample in 32 registers until here.
  asm volatile("" : "+f"(lane_count));
  float sum_ee[2] = {};
#pragma unroll
  for (int i = 0; i < kSampleTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float less_slope =
            __fmaf_rn(-slope[half], x[4 * i + 2 * half + e], max_nan(x[4 * i + 2 * half + e], 0));
        const float residual = __fmaf_rn(-intercept[half], is_sample(i, e), less_slope);
        sum_ee[half] = __fmaf_rn(residual, residual, sum_ee[half]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float mean = quad_sum(sum_ee[half]) * inverse_n;
    result.rms[half] = constant[half] ? 0 : sqrtf(mean);
  }
  return result;
}

// kappa: the rms of all elements of the sampled keys. All lanes of a warp call.
__device__ inline float key_rms(const SampledShared& shared, int count, int dim) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < static_cast<int>(kMaxSamples); i += 32) {
    sum += i + lane < count ? shared.squares[i + lane] : 0;
  }
  return sqrtf(lane_sum<32>(sum) / static_cast<float>(count * dim));
}

// Adds up the squares of each of a lane's heads.
template <DType type, bool fp16, int dim>
__device__ void sum_squares(const HeadOperands<type, fp16, dim, 1>& heads, float (&sum)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int s = 0; s < dim / kMmaDepth; ++s) {
      float q[4];
      heads.floats(0, half, s, q);
#pragma unroll
      for (const float element : q) {
        sum[half] = __fmaf_rn(element, element, sum[half]);
      }
    }
    sum[half] = quad_sum(sum[half]);
  }
}

// The products of a lane's heads with the last key that the query sees.
template <class Source, DType type, bool fp16, int dim>
__device__ void self_products(const Source& keys, const HeadOperands<type, fp16, dim, 1>& heads,
                              Range range, float (&x)[2]) {
  const std::int64_t token = std::int64_t{range.start} + range.length - 1;
  const int first = static_cast<int>(threadIdx.x) % 4 * (dim / 4);
  with_dtype(keys.dtype, [&]<DType k_type>() {
    const std::byte* row = key_address<k_type>(keys, token);
#pragma unroll
    for (int s = 0; s < dim / kMmaDepth; ++s) {
      Elements<k_type, 4> elements;
      elements.load(row, first + 4 * s);
      float k[4];
      elements.floats(0, k);
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float q[4];
        heads.floats(0, half, s, q);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          x[half] = __fmaf_rn(q[e], k[e], x[half]);
        }
      }
    }
  });
  const float scale = keys.dtype == DType::e4m3 ? key_scale<DType::e4m3>(keys, token) : 1.0F;
#pragma unroll
  for (float& product : x) {
    product = scale * quad_sum(product);
  }
}

// What the router needs to know about a lane's heads besides their fits: |q|^2, or the product with
// the last key.
template <class Source, DType type, bool fp16, int dim>
__device__ void head_statistics(const SampledArguments<Source>& arguments,
                                const HeadOperands<type, fp16, dim, 1>& heads, Range range,
                                float (&statistic)[2]) {
  const Router router = arguments.router;
  if (router == Router::nonlinearity || router == Router::qnorm) {
    sum_squares(heads, statistic);
  } else if (router == Router::self) {
    self_products(arguments.problem.k, heads, range, statistic);
  }
}

// The weights of a lane's heads; 0 for heads beyond H.
template <class Source>
__device__ void load_weights(const ProblemOf<Source>& problem, std::int64_t t, int first,
                             float (&weight)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = first + half * 8 + static_cast<int>(threadIdx.x) % 32 / 4;
    weight[half] = head < problem.q.heads ? problem.w.data[t * problem.w.token_stride + head] : 0;
  }
}

// Step 4 for the heads from `first` on.
template <class Source>
__device__ void write_values(SampledShared& shared, const SampledArguments<Source>& arguments,
                             int query, int first, const LaneFit& fit, float kappa,
                             const float (&statistic)[2], const float (&weight)[2]) {
  const Router router = arguments.router;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = first + half * 8 + lane / 4;
    if (lane % 4 != 0 || head >= arguments.problem.q.heads) {
      continue;
    }
    const float slope = fit.slope[half];
    const float rms = fit.rms[half];
    const float w = weight[half];
    float value = fabsf(w);
    if (router == Router::nonlinearity) {
      value *= rms + kFireChance * sqrtf(statistic[half]) * kappa * (1 - slope);
    } else if (router == Router::dispersion) {
      value *= rms;
    } else if (router == Router::self) {
      value = w * max_nan(statistic[half], 0);
    } else if (router == Router::qnorm) {
      value = sqrtf(statistic[half]);
    }
    shared.value[query][head] = value;
    shared.coefficient[query][head] = w * slope;
  }
}

// Sets the bits of active heads that choose_heads did not choose: fixed ones and the pooled
// router's.
__device__ inline void mark_active(const Queries& q, const std::int32_t* heads, int count,
                                   std::uint32_t* active) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane < kMaxHeads / 32) {
    active[lane] = 0;
  }
  __syncwarp();
  for (int i = lane; i < count; i += 32) {
    const std::int32_t head = heads[i];
    if (is_head(q, head)) {
      atomicOr(&active[head / 32], 1U << head % 32);
    }
  }
}

// Step 5's residual row. All lanes of a warp call.
template <DType type, int dim, class Source>
__device__ void write_residual(const SampledShared& shared,
                               const SampledArguments<Source>& arguments, std::int64_t t, int query,
                               bool empty) {
  constexpr int kHeadsInFlight = 32 / static_cast<int>(size_of(type));
  const ProblemOf<Source>& problem = arguments.problem;
  const Routing& out = arguments.out;
  const int heads = static_cast<int>(problem.q.heads);
  const int d = static_cast<int>(threadIdx.x) % 32 * kResidualElements;
  const std::byte* row = head_row(problem.q, t, 0) + d * static_cast<int>(size_of(type));
  const std::int64_t step = problem.q.head_stride * static_cast<std::int64_t>(size_of(type));
  float sum[kResidualElements] = {};
  for (int first = 0; first < heads && d < dim && !empty; first += kHeadsInFlight) {
    Elements<type, kResidualElements> elements[kHeadsInFlight];
#pragma unroll
    for (int i = 0; i < kHeadsInFlight; ++i, row += step) {
      elements[i].clear();
      if (first + i < heads) {
        elements[i].load(row, 0);
      }
    }
    const std::uint32_t inactive = ~(shared.active[query][first / 32] >> first % 32);
#pragma unroll
    for (int i = 0; i < kHeadsInFlight; ++i) {
      const float coefficient = shared.coefficient[query][first + i];
      float q[kResidualElements];
      elements[i].floats(0, q);
#pragma unroll
      for (int e = 0; e < kResidualElements; ++e) {
        sum[e] = first + i < heads && (inactive >> i & 1) != 0
                     ? __fmaf_rn(coefficient, q[e], sum[e])
                     : sum[e];
      }
    }
  }

  float largest = 0;
  bool finite = true;
#pragma unroll
  for (const float element : sum) {
    largest = fmaxf(largest, fabsf(element));
    finite = finite && isfinite(element);
  }
  // The bits of nonnegative floats have the order of the floats.
  largest = __uint_as_float(__reduce_max_sync(kFullMask, __float_as_uint(largest)));
  finite = __all_sync(kFullMask, finite);
  const float scale = finite ? largest / kE4m3Max : 1;
  if (d < dim) {
#pragma unroll
    for (int e = 0; e < kResidualElements; ++e) {
      out.residual[t * dim + d + e] = sum[e];
    }
    if (out.rounded != nullptr) {
      std::uint32_t bytes = 0;
#pragma unroll
      for (int e = 0; e < kResidualElements; ++e) {
        constexpr std::uint8_t kNaN = 0x7F;
        const std::uint8_t byte = !isfinite(sum[e]) ? kNaN
                                  : scale > 0       ? float_to_e4m3(sum[e] / scale)
                                                    : std::uint8_t{0};
        bytes |= std::uint32_t{byte} << 8 * e;
      }
      *reinterpret_cast<std::uint32_t*>(out.rounded + t * dim + d) = bytes;
    }
  }
  if (d == 0 && out.rounded != nullptr) {
    out.rounded_scale[t] = scale;
  }
}

// Step 5. No query has more than `max_heads` heads.
template <DType type, int dim, int max_heads, class Source>
__device__ void write_routing(SampledShared& shared, const SampledArguments<Source>& arguments,
                              std::int64_t t, int query) {
  const bool empty = visible(arguments.problem.k, t).length == 0;
  const bool heads_given = arguments.router == Router::pooled || arguments.router == Router::fixed;
  std::int32_t* chosen = arguments.out.heads + t * arguments.count;
  if (!heads_given && !empty) {
    choose_heads<max_heads>(
        static_cast<int>(arguments.problem.q.heads), arguments.count,
        [&](int j) { return shared.value[query][j]; }, chosen, shared.active[query]);
  } else if (arguments.router != Router::pooled) {
    for (int i = static_cast<int>(threadIdx.x) % 32; i < arguments.count; i += 32) {
      chosen[i] = empty ? -1 : arguments.fixed[i];
    }
    __syncwarp();
  }
  if (arguments.residual) {
    if (heads_given && !empty) {
      mark_active(arguments.problem.q, chosen, arguments.count, shared.active[query]);
    }
    __syncwarp();
    write_residual<type, dim>(shared, arguments, t, query, empty);
  }
}

}  // namespace misa::cuda::route
