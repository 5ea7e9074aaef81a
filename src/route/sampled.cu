// Routing by the sample grid (MISA-R): a block of threads serves up to 16 consecutive queries.
//
//  1. Queries whose grids start at the same key with the same stride share the sampled keys, at
//     most 128, as operands in shared memory, scales apart. Rows up to 128 are zero.
//  2. A warp takes 16 or 32 heads of a query. x = scale * (q . k) of 16 samples at a time passes by
//     twice, for computing x again costs less than registers for all samples would: a lane holds
//     heads g and g + 8 of a tile and two samples in eight.
//  3. The first time r = max(0, x) and d = x - shift give the sums of d, r, d d and d r, and these
//     give means, centred moments and the slope p = Sxr / Sxx. The shift is the mean of the first
//     8 samples (4, 2 or 1 where there are fewer): exact where x is constant, so that d is 0 and
//     the slope too; and no farther from the mean than 4 standard deviations, whatever x.
//     The second time the rms of r - p x - (mean r - p mean x). A lane sums its samples in order,
//     then the four lanes of a head add up.
//  4. From that or from the head alone, what the head is worth; and w p.
//  5. A warp takes a query: chooses its heads, unless they were given, and sums the residual row
//     over the other heads, ascending. Where keys are e4m3 the row is rounded with scale
//     max|row| / 448.
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
  int queries;                    // of a block of threads
  std::uint8_t fixed[kMaxHeads];  // Router::fixed: the heads, ascending
};

// Four elements a lane make a key; fewer lanes do where D = 64.
constexpr int kLaneElements = 4;

// Keys in flight a warp while the samples are loaded: all of them.
constexpr int kBatch = static_cast<int>(kMaxSamples) / kWarps;

// Tiles of heads that a warp multiplies at once: operands take 32 registers a tile and part.
template <DType type>
constexpr int kTilesOf = type == DType::f32 ? 1 : 2;

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

// Step 1.
template <int dim, bool fp16>
__device__ void load_samples(SampleShared& shared, SampleRow<dim>* rows, const Arguments& arguments,
                             const Grid& grid) {
  const Keys& keys = arguments.problem.k;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int d = static_cast<int>(threadIdx.x) % 32 * kLaneElements;
  with_dtype(keys.dtype, [&]<DType type>() {
    Elements<type, kLaneElements> elements[kBatch];
    float scale[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int sample = warp + i * kWarps;
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
      const int sample = warp + i * kWarps;
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
          if constexpr (fp16 && type == DType::e4m3) {
            elements[i].fp16(0, pairs);
          } else {
            elements[i].parts(0, part, pairs);
          }
          store_operand(rows[part * kMaxSamples + sample], d, dim, pairs);
        }
      }
    }
  });
}

// Of the heads that a lane holds: g and g + 8 of each tile.
template <int tiles>
struct Fit {
  float slope[tiles][2];
  float rms[tiles][2];
};

// visit(first, one, x), 8 samples at a time: x[m][half][e] is of sample first + 2c + e and head g
// (half 0) or g + 8 of tile m. one[e] is 1, or 0 where the sample is not below `count`; x is 0
// there.
template <int key_parts, DType type, bool fp16, int dim, int tiles, class Visit>
__device__ void visit_products(const SampleShared& shared, const SampleRow<dim>* rows,
                               const HeadRows<type, fp16, dim, tiles>& heads, int count,
                               const Visit& visit) {
  const int c = static_cast<int>(threadIdx.x) % 4;
#pragma unroll 1
  for (int pass = 0; pass < count; pass += kPair * kTileKeys) {
    float products[kPair][tiles][4] = {};
    add_products<key_parts>(heads, rows[pass], static_cast<int>(kMaxSamples) * operand_pitch(dim),
                            products);
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
      const int first = pass + i * kTileKeys;
      const float2 scales = *reinterpret_cast<const float2*>(&shared.scale[first + 2 * c]);
      const float scale[2] = {scales.x, scales.y};
      float one[2];
      float x[tiles][2][2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool valid = first + 2 * c + e < count;
        one[e] = valid ? 1 : 0;
#pragma unroll
        for (int k = 0; k < tiles * 2; ++k) {
          const float product = products[i][k / 2][k % 2 * 2 + e] * scale[e];
          x[k / 2][k % 2][e] = valid ? product : 0;
        }
      }
      visit(first, one, x);
    }
  }
}

// Steps 2 and 3. `linear` says that the rest of the linear fit is wanted, else that of the mean:
// the standard deviation of r.
template <int key_parts, DType type, bool fp16, int dim, int tiles>
__device__ Fit<tiles> fit(const SampleShared& shared, const SampleRow<dim>* rows,
                          const HeadRows<type, fp16, dim, tiles>& heads, int count, bool linear) {
  const int c = static_cast<int>(threadIdx.x) % 4;
  const int shift_count = count >= 8 ? 8 : count >= 4 ? 4 : count >= 2 ? 2 : 1;
  const float shift_factor = 1 / static_cast<float>(shift_count);
  float shift[tiles][2];
  float sum_d[tiles][2] = {};
  float sum_r[tiles][2] = {};
  float sum_dd[tiles][2] = {};
  float sum_dr[tiles][2] = {};
  const auto add_moments = [&](int first, const float(&one)[2], const float(&x)[tiles][2][2]) {
    if (first == 0) {
#pragma unroll
      for (int k = 0; k < tiles * 2; ++k) {
        float sum = 2 * c < shift_count ? x[k / 2][k % 2][0] : 0;
        sum += 2 * c + 1 < shift_count ? x[k / 2][k % 2][1] : 0;
        shift[k / 2][k % 2] = sum_of_four(sum) * shift_factor;
      }
    }
#pragma unroll
    for (int m = 0; m < tiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float d = __fmaf_rn(-shift[m][half], one[e], x[m][half][e]);
          const float r = max_nan(x[m][half][e], 0);
          sum_d[m][half] += d;
          sum_r[m][half] += r;
          sum_dd[m][half] = __fmaf_rn(d, d, sum_dd[m][half]);
          sum_dr[m][half] = __fmaf_rn(d, r, sum_dr[m][half]);
        }
      }
    }
  };
  visit_products<key_parts>(shared, rows, heads, count, add_moments);

  const auto n = static_cast<float>(count);
  Fit<tiles> result;
  bool constant[tiles][2];
  float slope[tiles][2];
  float intercept[tiles][2];
#pragma unroll
  for (int m = 0; m < tiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float mean_d = sum_of_four(sum_d[m][half]) / n;
      const float mean_r = sum_of_four(sum_r[m][half]) / n;
      const float xx = __fmaf_rn(-n * mean_d, mean_d, sum_of_four(sum_dd[m][half]));
      const float xr = __fmaf_rn(-n * mean_d, mean_r, sum_of_four(sum_dr[m][half]));
      // Where x varies by less than fp32 can square, it counts as constant. NaN does not.
      constant[m][half] = xx <= 0;
      result.slope[m][half] = constant[m][half] ? 0 : xr / xx;
      slope[m][half] = linear ? result.slope[m][half] : 0;
      intercept[m][half] = __fmaf_rn(-slope[m][half], shift[m][half] + mean_d, mean_r);
    }
  }

  float sum_ee[tiles][2] = {};
  const auto add_squares = [&](int, const float(&one)[2], const float(&x)[tiles][2][2]) {
#pragma unroll
    for (int m = 0; m < tiles; ++m) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float element = x[m][half][e];
          const float above = __fmaf_rn(-slope[m][half], element, max_nan(element, 0));
          const float rest = __fmaf_rn(-intercept[m][half], one[e], above);
          sum_ee[m][half] = __fmaf_rn(rest, rest, sum_ee[m][half]);
        }
      }
    }
  };
  visit_products<key_parts>(shared, rows, heads, count, add_squares);
#pragma unroll
  for (int m = 0; m < tiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float mean = sum_of_four(sum_ee[m][half]) / n;
      result.rms[m][half] = constant[m][half] ? 0 : sqrtf(mean);
    }
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

// Sums of squares of a lane's heads.
template <DType type, bool fp16, int dim, int tiles>
__device__ void sum_squares(const HeadRows<type, fp16, dim, tiles>& heads, float (&sum)[tiles][2]) {
#pragma unroll
  for (int m = 0; m < tiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      sum[m][half] = 0;
#pragma unroll
      for (int s = 0; s < dim / kStep; ++s) {
        float q[4];
        heads.floats(m, half, s, q);
#pragma unroll
        for (const float element : q) {
          sum[m][half] = __fmaf_rn(element, element, sum[m][half]);
        }
      }
      sum[m][half] = sum_of_four(sum[m][half]);
    }
  }
}

// Products of a lane's heads with the last key of the range.
template <DType type, bool fp16, int dim, int tiles>
__device__ void self_products(const Arguments& arguments,
                              const HeadRows<type, fp16, dim, tiles>& heads, Range range,
                              float (&x)[tiles][2]) {
  const Keys& keys = arguments.problem.k;
  const std::int64_t token = std::int64_t{range.start} + range.length - 1;
  const int first = static_cast<int>(threadIdx.x) % 4 * (dim / 4);
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
      for (int i = 0; i < tiles * 2; ++i) {
        float q[4];
        heads.floats(i / 2, i % 2, s, q);
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          x[i / 2][i % 2] = __fmaf_rn(q[e], k[e], x[i / 2][i % 2]);
        }
      }
    }
  });
  const float scale = keys.dtype == DType::e4m3 ? __ldg(keys.scale + token) : 1.0F;
#pragma unroll
  for (int i = 0; i < tiles * 2; ++i) {
    x[i / 2][i % 2] = scale * sum_of_four(x[i / 2][i % 2]);
  }
}

// Steps 2 to 4 for the heads from `first` on of query t.
template <int key_parts, DType type, bool fp16, int dim>
__device__ void judge_heads(SampleShared& shared, const SampleRow<dim>* rows,
                            const Arguments& arguments, std::int64_t t, int slot, int first,
                            Range range) {
  constexpr int kT = kTilesOf<type>;
  const Problem& problem = arguments.problem;
  const Router router = arguments.router;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  HeadRows<type, fp16, dim, kT> heads;
  heads.load(problem.q, arguments.q_aligned, t, first);

  float x[kT][2] = {};
  if (router == Router::nonlinearity || router == Router::qnorm) {
    sum_squares(heads, x);
  } else if (router == Router::self) {
    self_products(arguments, heads, range, x);
  }
  Fit<kT> result{};
  float kappa = 0;
  if (arguments.fits) {
    const int count = Grid(range).count;
    result = fit<key_parts>(shared, rows, heads, count, router != Router::dispersion);
    kappa = entry_rms(shared, count, dim);
  }
#pragma unroll
  for (int i = 0; i < kT * 2; ++i) {
    const int head = first + i * 8 + lane / 4;
    if (lane % 4 != 0 || head >= problem.q.heads) {
      continue;
    }
    const float slope = result.slope[i / 2][i % 2];
    const float rms = result.rms[i / 2][i % 2];
    const float own = x[i / 2][i % 2];
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
  constexpr int kUnroll = 32 / static_cast<int>(size_of(type));  // heads in flight
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
  constexpr int kHeads = kTilesOf<type> * kTileHeads;
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<SampleShared*>(memory);
  auto* rows = reinterpret_cast<SampleRow<dim>*>(memory + sizeof(SampleShared));
  const Problem& problem = arguments.problem;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * arguments.queries;
  const int queries = static_cast<int>(min(std::int64_t{arguments.queries}, problem.q.tokens - t0));
  const int groups = (static_cast<int>(problem.q.heads) + kHeads - 1) / kHeads;
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
                                                task % groups * kHeads, range);
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
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             static_cast<int>(bytes)),
        "cudaFuncSetAttribute");
  const auto blocks = static_cast<unsigned>((arguments.problem.q.tokens + arguments.queries - 1) /
                                            arguments.queries);
  kernel<<<blocks, kThreads, bytes, stream>>>(arguments);
  check(cudaGetLastError(), "sampled_kernel");
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
  arguments.q_aligned = is_aligned(problem.q);
  arguments.k_aligned = is_aligned(problem.k);
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
