// SPDX-License-Identifier: Apache-2.0
// What kernels of sampled routing share: the grid, the fit, what a head is worth, the choice and
// the residual row. The steps are those of sampled.cu.
#pragma once

#include <cstdint>

#include "cuda/heads.cuh"
#include "cuda/range.cuh"
#include "route/generic_config.cuh"
#include "route/sampled.hpp"

namespace misa::cuda::route {

struct SampledArguments {
  Problem problem;
  Routing out;
  Router router;
  std::int32_t count;  // heads wanted
  bool fits;           // the router or the residual row asks for slopes
  bool residual;
  int queries;                    // of a block of threads
  std::uint8_t fixed[kMaxHeads];  // Router::fixed: the heads, ascending
};

// Four elements a lane make a row; fewer lanes do where D = 64.
inline constexpr int kLaneElements = 4;

// Tiles of samples.
inline constexpr int kSampleTiles = static_cast<int>(kMaxSamples) / kTileKeys;

// The sample grid of n positions: 0, s, 2 s, … below n; s = 2^shift is the smallest power of two
// with s >= n / 128.
struct Grid {
  std::int32_t start;  // of the query's keys
  int shift;
  int count;

  __device__ explicit Grid(Range range) : start(range.start), shift(0), count(0) {
    if (range.length > 0) {
      shift = 32 - __clz((range.length - 1) / static_cast<int>(kMaxSamples));
      count = ((range.length - 1) >> shift) + 1;
    }
  }
  __device__ bool shares(const Grid& other) const {
    return start == other.start && shift == other.shift;
  }
};

// A sum and the squares of some elements of a sampled key.
template <int count>
__device__ float add_squares(float squares, const float (&value)[count], float scale) {
#pragma unroll
  for (const float element : value) {
    const float scaled = scale * element;
    squares = __fmaf_rn(scaled, scaled, squares);
  }
  return squares;
}

// Products of a lane's heads g (half 0) and g + 8: x[4 i + 2 half + e] is of sample 8 i + 2 c + e.
using Products = float[4 * kSampleTiles];

struct Fit {
  float slope[2];
  float rms[2];
};

// Step 2's end: scales of keys. x is 0 beyond the `count` samples of the query.
__device__ inline void scale_products(const SampleShared& shared, int count, Products& x) {
  const int c = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int i = 0; i < kSampleTiles; ++i) {
    const int sample = i * kTileKeys + 2 * c;
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

// Step 3. `linear` says that the rest of the linear fit is wanted, else that of the mean: the
// standard deviation of r.
__device__ inline Fit fit(const Products& x, int count, bool linear) {
  const int c = static_cast<int>(threadIdx.x) % 4;
  const auto n = static_cast<float>(count);
  const float share = 1 / n;
  auto own = static_cast<float>(count - 2 * c);
  // 1 for the query's samples, 0 behind them.
  const auto one = [&](int i, int e) {
    return __saturatef(own - static_cast<float>(i * kTileKeys + e));
  };
  const int shift_count = count >= 8 ? 8 : count >= 4 ? 4 : count >= 2 ? 2 : 1;
  float shift[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 2 * c < shift_count ? x[2 * half] : 0;
    sum += 2 * c + 1 < shift_count ? x[2 * half + 1] : 0;
    shift[half] = sum_of_four(sum) * (1 / static_cast<float>(shift_count));
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
        const float d = __fmaf_rn(-shift[half], one(i, e), x[4 * i + 2 * half + e]);
        const float r = max_nan(x[4 * i + 2 * half + e], 0);
        sum_d[half] += d;
        sum_r[half] += r;
        sum_dd[half] = __fmaf_rn(d, d, sum_dd[half]);
        sum_dr[half] = __fmaf_rn(d, r, sum_dr[half]);
      }
    }
  }
  Fit result;
  bool constant[2];
  float slope[2];
  float intercept[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float mean_d = sum_of_four(sum_d[half]) * share;
    const float mean_r = sum_of_four(sum_r[half]) * share;
    const float xx = __fmaf_rn(-n * mean_d, mean_d, sum_of_four(sum_dd[half]));
    const float xr = __fmaf_rn(-n * mean_d, mean_r, sum_of_four(sum_dr[half]));
    // Where x varies by less than fp32 can square, it counts as constant. NaN does not.
    constant[half] = xx <= 0;
    result.slope[half] = constant[half] ? 0 : xr / xx;
    slope[half] = linear ? result.slope[half] : 0;
    intercept[half] = __fmaf_rn(-slope[half], shift[half] + mean_d, mean_r);
  }
  // Ones are worked out anew: kept, they would take 32 registers.
  asm volatile("" : "+f"(own));
  float sum_ee[2] = {};
#pragma unroll
  for (int i = 0; i < kSampleTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float above =
            __fmaf_rn(-slope[half], x[4 * i + 2 * half + e], max_nan(x[4 * i + 2 * half + e], 0));
        const float rest = __fmaf_rn(-intercept[half], one(i, e), above);
        sum_ee[half] = __fmaf_rn(rest, rest, sum_ee[half]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float mean = sum_of_four(sum_ee[half]) * share;
    result.rms[half] = constant[half] ? 0 : sqrtf(mean);
  }
  return result;
}

// kappa: the rms of the entries of the sampled keys. A warp works.
__device__ inline float entry_rms(const SampleShared& shared, int count, int dim) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < static_cast<int>(kMaxSamples); i += 32) {
    sum += i + lane < count ? shared.squares[i + lane] : 0;
  }
  return sqrtf(sum_of_lanes<32>(sum) / static_cast<float>(count * dim));
}

// Sums of squares of a lane's heads.
template <DType type, bool fp16, int dim>
__device__ void sum_squares(const HeadRows<type, fp16, dim, 1>& heads, float (&sum)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
#pragma unroll
    for (int s = 0; s < dim / kStep; ++s) {
      float q[4];
      heads.floats(0, half, s, q);
#pragma unroll
      for (const float element : q) {
        sum[half] = __fmaf_rn(element, element, sum[half]);
      }
    }
    sum[half] = sum_of_four(sum[half]);
  }
}

// Products of a lane's heads with the last key of the range.
template <DType type, bool fp16, int dim>
__device__ void self_products(const Keys& keys, const HeadRows<type, fp16, dim, 1>& heads,
                              Range range, float (&x)[2]) {
  const std::int64_t token = std::int64_t{range.start} + range.length - 1;
  const int first = static_cast<int>(threadIdx.x) % 4 * (dim / 4);
  with_dtype(keys.dtype, [&]<DType k_type>() {
    const auto* row = static_cast<const std::byte*>(keys.data) +
                      token * keys.stride * static_cast<std::int64_t>(size_of(k_type));
#pragma unroll
    for (int s = 0; s < dim / kStep; ++s) {
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
  const float scale = keys.dtype == DType::e4m3 ? __ldg(keys.scale + token) : 1.0F;
#pragma unroll
  for (float& product : x) {
    product = scale * sum_of_four(product);
  }
}

// What a router asks of the heads alone.
template <DType type, bool fp16, int dim>
__device__ void judge_alone(const SampledArguments& arguments,
                            const HeadRows<type, fp16, dim, 1>& heads, Range range,
                            float (&own)[2]) {
  const Router router = arguments.router;
  if (router == Router::nonlinearity || router == Router::qnorm) {
    sum_squares(heads, own);
  } else if (router == Router::self) {
    self_products(arguments.problem.k, heads, range, own);
  }
}

// The weights of a lane's heads; 0 beyond H.
__device__ inline void load_weights(const Problem& problem, std::int64_t t, int first,
                                    float (&weight)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = first + half * 8 + static_cast<int>(threadIdx.x) % 32 / 4;
    weight[half] = head < problem.q.heads ? problem.w.data[t * problem.w.token_stride + head] : 0;
  }
}

// Step 4 for the heads from `first` on.
__device__ inline void write_values(SampleShared& shared, const SampledArguments& arguments,
                                    int slot, int first, const Fit& result, float kappa,
                                    const float (&own)[2], const float (&weight)[2]) {
  const Router router = arguments.router;
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = first + half * 8 + lane / 4;
    if (lane % 4 != 0 || head >= arguments.problem.q.heads) {
      continue;
    }
    const float slope = result.slope[half];
    const float rms = result.rms[half];
    const float w = weight[half];
    float value = fabsf(w);
    if (router == Router::nonlinearity) {
      value *= rms + kFireChance * sqrtf(own[half]) * kappa * (1 - slope);
    } else if (router == Router::dispersion) {
      value *= rms;
    } else if (router == Router::self) {
      value = w * max_nan(own[half], 0);
    } else if (router == Router::qnorm) {
      value = sqrtf(own[half]);
    }
    shared.value[slot][head] = value;
    shared.coefficient[slot][head] = w * slope;
  }
}

// Marks heads that were chosen elsewhere.
__device__ inline void mark_heads(const std::int32_t* heads, int count, std::uint32_t* active) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (lane < kMaxHeads / 32) {
    active[lane] = 0;
  }
  __syncwarp();
  for (int i = lane; i < count; i += 32) {
    atomicOr(&active[heads[i] / 32], 1U << heads[i] % 32);
  }
}

// Step 5's row. A warp works, four elements a lane.
template <DType type, int dim>
__device__ void write_residual(const SampleShared& shared, const SampledArguments& arguments,
                               std::int64_t t, int slot, bool empty) {
  constexpr int kInFlight = 32 / static_cast<int>(size_of(type));  // heads
  const Problem& problem = arguments.problem;
  const Routing& out = arguments.out;
  const int heads = static_cast<int>(problem.q.heads);
  const int d = static_cast<int>(threadIdx.x) % 32 * kLaneElements;
  const std::byte* row = head_row(problem.q, t, 0) + d * static_cast<int>(size_of(type));
  const std::int64_t step = problem.q.head_stride * static_cast<std::int64_t>(size_of(type));
  float sum[kLaneElements] = {};
  for (int first = 0; first < heads && d < dim && !empty; first += kInFlight) {
    Elements<type, kLaneElements> elements[kInFlight];
#pragma unroll
    for (int i = 0; i < kInFlight; ++i, row += step) {
      elements[i].clear();
      if (first + i < heads) {
        elements[i].load(row, 0);
      }
    }
    const std::uint32_t others = ~(shared.active[slot][first / 32] >> first % 32);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const float coefficient = shared.coefficient[slot][first + i];
      float q[kLaneElements];
      elements[i].floats(0, q);
#pragma unroll
      for (int e = 0; e < kLaneElements; ++e) {
        sum[e] = first + i < heads && (others >> i & 1) != 0 ? __fmaf_rn(coefficient, q[e], sum[e])
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
  // Floats of one sign have the order of their bits.
  largest = __uint_as_float(__reduce_max_sync(kFullMask, __float_as_uint(largest)));
  finite = __all_sync(kFullMask, finite);
  const float scale = finite ? largest / kE4m3Max : 1;
  if (d < dim) {
#pragma unroll
    for (int e = 0; e < kLaneElements; ++e) {
      out.residual[t * dim + d + e] = sum[e];
    }
    if (out.rounded != nullptr) {
      std::uint32_t bytes = 0;
#pragma unroll
      for (int e = 0; e < kLaneElements; ++e) {
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

// Step 5. No query has more than `max_heads`.
template <DType type, int dim, int max_heads>
__device__ void finish(SampleShared& shared, const SampledArguments& arguments, std::int64_t t,
                       int slot) {
  const bool empty = visible(arguments.problem.k, t).length == 0;
  const bool given = arguments.router == Router::pooled || arguments.router == Router::fixed;
  std::int32_t* chosen = arguments.out.heads + t * arguments.count;
  if (!given && !empty) {
    choose_heads<max_heads>(
        static_cast<int>(arguments.problem.q.heads), arguments.count,
        [&](int j) { return shared.value[slot][j]; }, chosen, shared.active[slot]);
  } else if (arguments.router != Router::pooled) {
    for (int i = static_cast<int>(threadIdx.x) % 32; i < arguments.count; i += 32) {
      chosen[i] = empty ? -1 : arguments.fixed[i];
    }
    __syncwarp();
  }
  if (arguments.residual) {
    if (given && !empty) {
      mark_heads(chosen, arguments.count, shared.active[slot]);
    }
    __syncwarp();
    write_residual<type, dim>(shared, arguments, t, slot, empty);
  }
}

}  // namespace misa::cuda::route
