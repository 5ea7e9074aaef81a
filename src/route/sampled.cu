// Routing by the sample grid (MISA-R): a block of threads serves 8 consecutive queries.
//
//  1. Queries whose grids start at the same key with the same stride share the sampled keys, at
//  most
//     128, as operands in shared memory: bf16 parts, scales apart.
//  2. A warp takes 16 heads of a query. x = scale * (q . k) of all samples stays in registers: a
//  lane
//     holds heads g and g + 8 and two samples in eight.
//  3. Means of x and of r = max(0, x); then centred moments and the slope p = Sxr / Sxx, 0 where x
//  is
//     constant to the bit; then the rms of r - p x - (mean r - p mean x). A lane sums its samples
//     in order, then the four lanes of a head add up.
//  4. From that or from the head alone, what the head is worth; and w p.
//  5. A warp takes a query: chooses its heads, unless they were given, and sums the residual row
//  over
//     the other heads, ascending. Where keys are e4m3 the row is rounded with scale max|row| / 448.
//
// So the order of every sum follows from n, H and D.
#include <cuda_runtime.h>

#include <algorithm>

#include "cuda/check.cuh"
#include "cuda/range.cuh"
#include "device/alignment.hpp"
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
  bool q_aligned;  // rows start on 16 bytes
  bool k_aligned;
  std::int32_t key_parts;
  std::uint8_t fixed[kMaxHeads];  // Router::fixed: the heads, ascending
};

constexpr int kSampleTiles = kMaxSamples / kTileKeys;

// Four elements a lane make a key; fewer lanes do where D = 64.
constexpr int kLaneElements = 4;

// Keys in flight a warp while the samples are loaded.
constexpr int kBatch = 8;

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

// Step 1. Rows up to a whole tile are zero.
template <int dim>
__device__ void load_samples(SampleShared& shared, SampleRow<dim>* rows, const Arguments& arguments,
                             const Grid& grid) {
  const Keys& keys = arguments.problem.k;
  const int d = static_cast<int>(threadIdx.x) % 32 * kLaneElements;
  const int padded = (grid.count + kTileKeys - 1) / kTileKeys * kTileKeys;
  with_dtype(keys.dtype, [&]<DType type>() {
    for (int first = static_cast<int>(threadIdx.x) / 32; first < padded; first += kWarps * kBatch) {
      Elements<type, kLaneElements> elements[kBatch];
      float scale[kBatch];
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int sample = first + i * kWarps;
        elements[i].clear();
        scale[i] = 0;
        if (sample < grid.count && d < dim) {
          const std::int64_t token = grid.start + (std::int64_t{sample} << grid.shift);
          const auto* row = static_cast<const std::byte*>(keys.data) +
                            token * keys.stride * static_cast<std::int64_t>(size_of(type));
          elements[i].load(row, d, arguments.k_aligned);
          scale[i] = type == DType::e4m3 ? __ldg(keys.scale + token) : 1.0F;
        }
      }
#pragma unroll
      for (int i = 0; i < kBatch; ++i) {
        const int sample = first + i * kWarps;
        if (sample >= padded) {
          continue;
        }
        float value[kLaneElements];
        elements[i].floats(0, value);
        float squares = 0;
#pragma unroll
        for (const float element : value) {
          const float scaled = scale[i] * element;
          squares = __fmaf_rn(scaled, scaled, squares);
        }
        squares = sum_of_warp(squares);
        if (d == 0) {
          shared.scale[sample] = scale[i];
          shared.squares[sample] = squares;
        }
        if (d < dim) {
#pragma unroll
          for (int part = 0; part < kParts<type>; ++part) {
            std::uint32_t pairs[2];
            elements[i].parts(0, part, pairs);
            store_operand(rows[part * kMaxSamples + sample], d, dim, pairs);
          }
        }
      }
    }
  });
}

// Of the two heads that a lane holds.
struct Fit {
  float slope[2];
  float rms[2];
};

// Steps 2 and 3. `linear` says that the rest of the linear fit is wanted, else that of the mean:
// the standard deviation of r.
template <DType type, int dim>
__device__ Fit fit(const SampleShared& shared, const SampleRow<dim>* rows,
                   const HeadRows<type, dim, 1>& heads, int key_parts, int count, bool linear) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int c = lane % 4;
  float x[kSampleTiles][4];
  float sum_x[2] = {};
  float sum_r[2] = {};
#pragma unroll
  for (int i = 0; i < kSampleTiles; ++i) {
    float products[1][4] = {};
    if (i * kTileKeys < count) {
      add_products(heads, rows[i * kTileKeys], key_parts,
                   static_cast<int>(kMaxSamples) * operand_pitch(dim), products);
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int sample = i * kTileKeys + 2 * c + e % 2;
        x[i][e] = sample < count ? shared.scale[sample] * products[0][e] : 0;
        sum_x[e / 2] += x[i][e];
        sum_r[e / 2] += max_nan(x[i][e], 0);
      }
    }
  }

  const auto n = static_cast<float>(count);
  float mean_x[2];
  float mean_r[2];
  float first[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    mean_x[half] = sum_of_four(sum_x[half]) / n;
    mean_r[half] = sum_of_four(sum_r[half]) / n;
    first[half] = __shfl_sync(kWarp, x[0][2 * half], lane - c);
  }

  bool varies[2] = {};
  float sum_xx[2] = {};
  float sum_xr[2] = {};
#pragma unroll
  for (int i = 0; i < kSampleTiles; ++i) {
    if (i * kTileKeys < count) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e / 2;
        const bool valid = i * kTileKeys + 2 * c + e % 2 < count;
        varies[half] = varies[half] || (valid && x[i][e] != first[half]);  // NaN varies
        const float dx = valid ? x[i][e] - mean_x[half] : 0;
        const float dr = max_nan(x[i][e], 0) - mean_r[half];
        sum_xx[half] = __fmaf_rn(dx, dx, sum_xx[half]);
        sum_xr[half] = __fmaf_rn(dx, dr, sum_xr[half]);
      }
    }
  }

  Fit result;
  bool constant[2];
  float slope[2];
  float intercept[2];
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const float xx = sum_of_four(sum_xx[half]);
    const float xr = sum_of_four(sum_xr[half]);
    // Where x varies by less than fp32 can square, it counts as constant.
    constant[half] = (__ballot_sync(kWarp, varies[half]) >> (lane - c) & 0xF) == 0 || xx == 0;
    result.slope[half] = constant[half] ? 0 : xr / xx;
    slope[half] = linear ? result.slope[half] : 0;
    intercept[half] = __fmaf_rn(-slope[half], mean_x[half], mean_r[half]);
  }

  float sum_ee[2] = {};
#pragma unroll
  for (int i = 0; i < kSampleTiles; ++i) {
    if (i * kTileKeys < count) {
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int half = e / 2;
        const bool valid = i * kTileKeys + 2 * c + e % 2 < count;
        const float fitted = __fmaf_rn(slope[half], x[i][e], intercept[half]);
        const float rest = valid ? max_nan(x[i][e], 0) - fitted : 0;
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
  float sum = 0;
  for (int i = static_cast<int>(threadIdx.x) % 32; i < count; i += 32) {
    sum += shared.squares[i];
  }
  return sqrtf(sum_of_warp(sum) / static_cast<float>(count * dim));
}

// Sums of squares of a lane's two heads.
template <DType type, int dim>
__device__ void sum_squares(const HeadRows<type, dim, 1>& heads, float (&sum)[2]) {
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    sum[half] = 0;
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

// Products of a lane's two heads with the last key that query t sees.
template <DType type, int dim>
__device__ void self_products(const Arguments& arguments, const HeadRows<type, dim, 1>& heads,
                              Range range, float (&x)[2]) {
  const Keys& keys = arguments.problem.k;
  const std::int64_t token = std::int64_t{range.start} + range.length - 1;
  const int first = static_cast<int>(threadIdx.x) % 4 * (dim / 4);
  x[0] = 0;
  x[1] = 0;
  with_dtype(keys.dtype, [&]<DType k_type>() {
    const auto* row = static_cast<const std::byte*>(keys.data) +
                      token * keys.stride * static_cast<std::int64_t>(size_of(k_type));
#pragma unroll
    for (int s = 0; s < dim / kStep; ++s) {
      Elements<k_type, 4> elements;
      elements.load(row, first + 4 * s, arguments.k_aligned);
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

// Steps 2 to 4 for the 16 heads from `first` on of query t.
template <DType type, int dim>
__device__ void judge_heads(SampleShared& shared, const SampleRow<dim>* rows,
                            const Arguments& arguments, std::int64_t t, int slot, int first,
                            Range range) {
  const Problem& problem = arguments.problem;
  const Router router = arguments.router;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  HeadRows<type, dim, 1> heads;
  heads.load(problem.q, arguments.q_aligned, t, first);

  Fit result{};
  float kappa = 0;
  if (arguments.fits) {
    const int count = Grid(range).count;
    result = fit<type, dim>(shared, rows, heads, arguments.key_parts, count,
                            router != Router::dispersion);
    kappa = entry_rms(shared, count, dim);
  }
  float x[2] = {};
  if (router == Router::nonlinearity || router == Router::qnorm) {
    sum_squares(heads, x);
  } else if (router == Router::self) {
    self_products(arguments, heads, range, x);
  }
#pragma unroll
  for (int half = 0; half < 2; ++half) {
    const int head = first + half * 8 + lane / 4;
    if (lane % 4 != 0 || head >= problem.q.heads) {
      continue;
    }
    const float w = problem.w.data[t * problem.w.token_stride + head];
    float value = fabsf(w);
    if (router == Router::nonlinearity) {
      const float chance = kFireChance * sqrtf(x[half]) * kappa * (1 - result.slope[half]);
      value *= result.rms[half] + chance;
    } else if (router == Router::dispersion) {
      value *= result.rms[half];
    } else if (router == Router::self) {
      value = w * max_nan(x[half], 0);
    } else if (router == Router::qnorm) {
      value = sqrtf(x[half]);
    }
    shared.value[slot][head] = value;
    shared.coefficient[slot][head] = w * result.slope[half];
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
  constexpr int kUnroll = 8;  // heads in flight
  const Problem& problem = arguments.problem;
  const Routing& out = arguments.out;
  const int heads = static_cast<int>(problem.q.heads);
  const int d = static_cast<int>(threadIdx.x) % 32 * kLaneElements;
  float sum[kLaneElements] = {};
  for (int first = 0; first < heads && d < dim && !empty; first += kUnroll) {
    Elements<type, kLaneElements> elements[kUnroll];
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      elements[i].load(head_row(problem.q, t, min(first + i, heads - 1)), d, arguments.q_aligned);
    }
#pragma unroll
    for (int i = 0; i < kUnroll; ++i) {
      const int head = first + i;
      if (head < heads && (shared.active[slot][head / 32] >> head % 32 & 1) == 0) {
        float q[kLaneElements];
        elements[i].floats(0, q);
#pragma unroll
        for (int e = 0; e < kLaneElements; ++e) {
          sum[e] = __fmaf_rn(shared.coefficient[slot][head], q[e], sum[e]);
        }
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

template <DType type, int dim>
__global__ void __launch_bounds__(kThreads, kBlocksPerSmOf<type>)
    sampled_kernel(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<SampleShared*>(memory);
  auto* rows = reinterpret_cast<SampleRow<dim>*>(memory + sizeof(SampleShared));
  const Problem& problem = arguments.problem;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * kQueries;
  const int queries = static_cast<int>(min(std::int64_t{kQueries}, problem.q.tokens - t0));
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
      load_samples<dim>(shared, rows, arguments, grid);
    }
    __syncthreads();
    for (int task = warp; task < (end - first) * groups; task += kWarps) {
      const int slot = first + task / groups;
      const Range range = visible(problem.k, t0 + slot);
      if (range.length > 0) {
        judge_heads<type, dim>(shared, rows, arguments, t0 + slot, slot, task % groups * kTileHeads,
                               range);
      }
    }
    __syncthreads();
  }

  if (warp >= queries) {  // step 5
    return;
  }
  const std::int64_t t = t0 + warp;
  const bool empty = visible(problem.k, t).length == 0;
  std::int32_t* chosen = arguments.out.heads + t * arguments.count;
  if (arguments.router != Router::pooled) {
    if (empty || arguments.router == Router::fixed) {
      for (int i = static_cast<int>(threadIdx.x) % 32; i < arguments.count; i += 32) {
        chosen[i] = empty ? -1 : arguments.fixed[i];
      }
      __syncwarp();
    } else {
      choose_heads(
          static_cast<int>(problem.q.heads), arguments.count,
          [&](int j) { return shared.value[warp][j]; }, chosen, shared.active[warp]);
    }
  }
  if (arguments.residual) {
    if (!empty && (arguments.router == Router::pooled || arguments.router == Router::fixed)) {
      mark_heads(chosen, arguments.count, shared.active[warp]);
    }
    __syncwarp();
    write_residual<type, dim>(shared, arguments, t, warp, empty);
  }
}

template <DType type, int dim>
void launch(const Arguments& arguments, cudaStream_t stream) {
  const auto kernel = sampled_kernel<type, dim>;
  const std::size_t bytes = sample_bytes<dim>(arguments.fits ? arguments.key_parts : 0);
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  const auto blocks = static_cast<unsigned>((arguments.problem.q.tokens + kQueries - 1) / kQueries);
  kernel<<<blocks, kThreads, bytes, stream>>>(arguments);
  check(cudaGetLastError(), "sampled_kernel");
}

template <DType type>
void launch(const Arguments& arguments, cudaStream_t stream) {
  if (arguments.problem.q.dim == 64) {
    launch<type, 64>(arguments, stream);
  } else {
    launch<type, 128>(arguments, stream);
  }
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
  arguments.q_aligned = is_aligned(problem.q);
  arguments.k_aligned = is_aligned(problem.k);
  arguments.key_parts = problem.k.dtype == DType::f32 ? kParts<DType::f32> : 1;
  std::copy(config.static_heads.begin(), config.static_heads.end(), arguments.fixed);
  std::sort(arguments.fixed, arguments.fixed + config.static_heads.size());
  switch (problem.q.dtype) {
    case DType::f32: return launch<DType::f32>(arguments, stream);
    case DType::bf16: return launch<DType::bf16>(arguments, stream);
    case DType::e4m3: return launch<DType::e4m3>(arguments, stream);
  }
}

}  // namespace misa::cuda::route
