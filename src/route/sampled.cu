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
// So the order of every sum follows from n, H and D.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/check.cuh"
#include "cuda/launch.cuh"
#include "cuda/range.cuh"
#include "route/generic_config.cuh"
#include "route/heads.cuh"
#include "route/sampled.hpp"

namespace misa::cuda::route {
namespace {

struct Arguments {
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
constexpr int kLaneElements = 4;

// Tiles of samples.
constexpr int kSampleTiles = static_cast<int>(kMaxSamples) / kTileKeys;

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

// Step 1. A lane has 16 bytes of a key, and all that it loads is in flight at once.
template <int dim, bool fp16>
__device__ void load_samples(SampleShared& shared, SampleRow<dim>* rows, const Arguments& arguments,
                             const Grid& grid) {
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
#pragma unroll
        for (const float element : value) {
          const float scaled = scale[i] * element;
          squares = __fmaf_rn(scaled, scaled, squares);
        }
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
#pragma unroll
      for (int step = 1; step < kLanes; step *= 2) {
        squares += __shfl_xor_sync(kWarp, squares, step);
      }
      if (d == 0) {
        shared.scale[sample] = scale[i];
        shared.squares[sample] = squares;
      }
    }
  });
}

// Products of a lane's heads g (half 0) and g + 8: x[i][e][half] is of sample 8 i + 2 c + e.
using Products = float[kSampleTiles][2][2];

struct Fit {
  float slope[2];
  float rms[2];
};

// Step 2. x is 0 beyond the `count` samples of the query.
template <int key_parts, DType type, bool fp16, int dim>
__device__ void multiply(const SampleShared& shared, const SampleRow<dim>* rows,
                         const HeadRows<type, fp16, dim, 1>& heads, int count, Products& x) {
  const int c = static_cast<int>(threadIdx.x) % 4;
#pragma unroll
  for (int first = 0; first < kSampleTiles; first += kPair) {
    float products[kPair][1][4] = {};
    add_products<key_parts>(heads, rows[first * kTileKeys], operand_pitch(dim),
                            static_cast<int>(kMaxSamples) * operand_pitch(dim), products);
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
      const int sample = (first + i) * kTileKeys + 2 * c;
      const float2 scales = *reinterpret_cast<const float2*>(&shared.scale[sample]);
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float scale = e == 0 ? scales.x : scales.y;
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const float product = products[i][0][2 * half + e] * scale;
          x[first + i][e][half] = sample + e < count ? product : 0;
        }
      }
    }
  }
}

// Step 3. `linear` says that the rest of the linear fit is wanted, else that of the mean: the
// standard deviation of r.
__device__ Fit fit(const Products& x, int count, bool linear) {
  const int c = static_cast<int>(threadIdx.x) % 4;
  const auto n = static_cast<float>(count);
  const auto own = static_cast<float>(count - 2 * c);
  // 1 for the query's samples, 0 behind them.
  const auto one = [&](int i, int e) {
    return __saturatef(own - static_cast<float>(i * kTileKeys + e));
  };
  const int shift_count = count >= 8 ? 8 : count >= 4 ? 4 : count >= 2 ? 2 : 1;
  float shift[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    float sum = 2 * c < shift_count ? x[0][0][half] : 0;
    sum += 2 * c + 1 < shift_count ? x[0][1][half] : 0;
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
        const float d = __fmaf_rn(-shift[half], one(i, e), x[i][e][half]);
        const float r = max_nan(x[i][e][half], 0);
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
    const float mean_d = sum_of_four(sum_d[half]) / n;
    const float mean_r = sum_of_four(sum_r[half]) / n;
    const float xx = __fmaf_rn(-n * mean_d, mean_d, sum_of_four(sum_dd[half]));
    const float xr = __fmaf_rn(-n * mean_d, mean_r, sum_of_four(sum_dr[half]));
    // Where x varies by less than fp32 can square, it counts as constant. NaN does not.
    constant[half] = xx <= 0;
    result.slope[half] = constant[half] ? 0 : xr / xx;
    slope[half] = linear ? result.slope[half] : 0;
    intercept[half] = __fmaf_rn(-slope[half], shift[half] + mean_d, mean_r);
  }
  float sum_ee[2] = {};
#pragma unroll
  for (int i = 0; i < kSampleTiles; ++i) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const float above = __fmaf_rn(-slope[half], x[i][e][half], max_nan(x[i][e][half], 0));
        const float rest = __fmaf_rn(-intercept[half], one(i, e), above);
        sum_ee[half] = __fmaf_rn(rest, rest, sum_ee[half]);
      }
    }
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float mean = sum_of_four(sum_ee[half]) / n;
    result.rms[half] = constant[half] ? 0 : sqrtf(mean);
  }
  return result;
}

// kappa: the rms of the entries of the sampled keys. A warp works.
__device__ float entry_rms(const SampleShared& shared, int count, int dim) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float sum = 0;
#pragma unroll
  for (int i = 0; i < static_cast<int>(kMaxSamples); i += 32) {
    sum += i + lane < count ? shared.squares[i + lane] : 0;
  }
  return sqrtf(sum_of_warp(sum) / static_cast<float>(count * dim));
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

// Steps 2 to 4 for the heads from `first` on of query t.
template <int key_parts, DType type, bool fp16, int dim>
__device__ void judge_heads(SampleShared& shared, const SampleRow<dim>* rows,
                            const Arguments& arguments, std::int64_t t, int slot, int first,
                            Range range) {
  const Problem& problem = arguments.problem;
  const Router router = arguments.router;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  HeadRows<type, fp16, dim, 1> heads;
  heads.load(problem.q, t, first);

  float x[2] = {};
  if (router == Router::nonlinearity || router == Router::qnorm) {
    sum_squares(heads, x);
  } else if (router == Router::self) {
    self_products(problem.k, heads, range, x);
  }
  Fit result{};
  float kappa = 0;
  if (arguments.fits) {
    const int count = Grid(range).count;
    Products products;
    multiply<key_parts>(shared, rows, heads, count, products);
    result = fit(products, count, router != Router::dispersion);
    kappa = entry_rms(shared, count, dim);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = first + half * 8 + lane / 4;
    if (lane % 4 != 0 || head >= problem.q.heads) {
      continue;
    }
    const float slope = result.slope[half];
    const float rms = result.rms[half];
    const float own = x[half];
    const float w = problem.w.data[t * problem.w.token_stride + head];
    float value = fabsf(w);
    if (router == Router::nonlinearity) {
      value *= rms + kFireChance * sqrtf(own) * kappa * (1 - slope);
    } else if (router == Router::dispersion) {
      value *= rms;
    } else if (router == Router::self) {
      value = w * max_nan(own, 0);
    } else if (router == Router::qnorm) {
      value = sqrtf(own);
    }
    shared.value[slot][head] = value;
    shared.coefficient[slot][head] = w * slope;
  }
}

// Marks heads that were chosen elsewhere.
__device__ void mark_heads(const std::int32_t* heads, int count, std::uint32_t* active) {
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
__device__ void write_residual(const SampleShared& shared, const Arguments& arguments,
                               std::int64_t t, int slot, bool empty) {
  constexpr int kInFlight = 16 / static_cast<int>(size_of(type));  // heads
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
    const std::uint32_t there = (1U << min(heads - first, kInFlight)) - 1;
    const std::uint32_t others = there & ~(shared.active[slot][first / 32] >> first % 32);
#pragma unroll
    for (int i = 0; i < kInFlight; ++i) {
      const float coefficient = shared.coefficient[slot][first + i];
      float q[kLaneElements];
      elements[i].floats(0, q);
#pragma unroll
      for (int e = 0; e < kLaneElements; ++e) {
        sum[e] = (others >> i & 1) != 0 ? __fmaf_rn(coefficient, q[e], sum[e]) : sum[e];
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
  largest = __uint_as_float(__reduce_max_sync(kWarp, __float_as_uint(largest)));
  finite = __all_sync(kWarp, finite);
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

// Step 5.
template <DType type, int dim>
__device__ void finish(SampleShared& shared, const Arguments& arguments, std::int64_t t, int slot) {
  const bool empty = visible(arguments.problem.k, t).length == 0;
  const bool given = arguments.router == Router::pooled || arguments.router == Router::fixed;
  std::int32_t* chosen = arguments.out.heads + t * arguments.count;
  if (!given && !empty) {
    choose_heads(
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

template <int key_parts, DType type, bool fp16, int dim>
__global__ void __launch_bounds__(kThreads, kBlocksPerSmOf<type>)
    sampled_kernel(const __grid_constant__ Arguments arguments) {
  begin_kernel();
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<SampleShared*>(memory);
  auto* rows = reinterpret_cast<SampleRow<dim>*>(memory + sizeof(SampleShared));
  const Problem& problem = arguments.problem;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * arguments.queries;
  const int queries = static_cast<int>(min(std::int64_t{arguments.queries}, problem.q.tokens - t0));
  const int groups = (static_cast<int>(problem.q.heads) + kTileHeads - 1) / kTileHeads;
  const int warp = static_cast<int>(threadIdx.x) / 32;

  for (int first = 0, end = 0; first < queries; first = end) {
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
    finish<type, dim>(shared, arguments, t0 + slot, slot);
  }
}

template <int key_parts, DType type, bool fp16, int dim>
void launch(const Arguments& arguments, cudaStream_t stream) {
  const auto kernel = sampled_kernel<key_parts, type, fp16, dim>;
  const std::size_t bytes = sample_bytes<dim>(arguments.fits ? key_parts : 0);
  const auto blocks = static_cast<unsigned>((arguments.problem.q.tokens + arguments.queries - 1) /
                                            arguments.queries);
  launch_kernel("sampled routing", kernel, dim3(blocks), kThreads, bytes, stream, arguments);
}

template <int key_parts, DType type, bool fp16>
void launch(const Arguments& arguments, cudaStream_t stream) {
  if (arguments.problem.q.dim == 64) {
    launch<key_parts, type, fp16, 64>(arguments, stream);
  } else {
    launch<key_parts, type, fp16, 128>(arguments, stream);
  }
}

template <DType type>
void launch(const Arguments& arguments, cudaStream_t stream) {
  const DType keys = arguments.problem.k.dtype;
  if (keys == DType::f32) {
    launch<kParts<DType::f32>, type, false>(arguments, stream);
  } else if (type == DType::e4m3 && keys == DType::e4m3) {
    launch<1, type, type == DType::e4m3>(arguments, stream);
  } else {
    launch<1, type, false>(arguments, stream);
  }
}

// Consecutive queries for a block of threads: as many as leave no SM with fewer blocks than it
// holds.
int queries_of_block(std::int64_t tokens) {
  int device = 0;
  int sms = 0;
  check(cudaGetDevice(&device), "cudaGetDevice");
  check(cudaDeviceGetAttribute(&sms, cudaDevAttrMultiProcessorCount, device),
        "cudaDeviceGetAttribute");
  const std::int64_t blocks = std::int64_t{sms} * kBlocksPerSm;
  return static_cast<int>(std::clamp<std::int64_t>((tokens + blocks - 1) / blocks, 1, kQueries));
}

}  // namespace

void launch_sampled(const Problem& problem, const IndexerConfig& config, const Routing& out,
                    cudaStream_t stream) {
  Arguments arguments{};
  arguments.problem = problem;
  arguments.out = out;
  arguments.router = config.router;
  arguments.count = config.heads;
  arguments.residual = config.residual;
  arguments.fits = config.residual || config.router == Router::nonlinearity ||
                   config.router == Router::dispersion;
  arguments.queries = queries_of_block(problem.q.tokens);
  std::copy(config.static_heads.begin(), config.static_heads.end(), arguments.fixed);
  std::sort(arguments.fixed, arguments.fixed + config.static_heads.size());
  switch (problem.q.dtype) {
    case DType::f32: return launch<DType::f32>(arguments, stream);
    case DType::bf16: return launch<DType::bf16>(arguments, stream);
    case DType::e4m3: return launch<DType::e4m3>(arguments, stream);
  }
}

}  // namespace misa::cuda::route
