// SPDX-License-Identifier: Apache-2.0
// Scores on the tensor cores (bf16 operands, fp32 sums) and, where q or k is f32, on the others.
//
// rows_kernel, a block a query:
//  1. An active head is copied as an operand, with its weight.
//  2. The residual row follows: the e4m3 one with its scale as the weight; for bf16 keys three rows
//     of bf16 whose sum is exactly the fp32 row; for f32 the row itself.
//  3. Rows up to the next group are zero.
//
// tensor_kernel, a warp 32 columns:
//  1. Without a list a column is a key, and the warp serves the 32 queries of its block that see
//     any of its keys; with a list it serves one query.
//  2. The keys are held in registers as bf16. A negative or non-finite scale is folded into them.
//  3. A query's rows stream by in groups of 8: products of 32 keys and 8 rows, clipped at the rows'
//     floors, weighted and added, rows in order.
//  4. The four lanes that share a key add up, the key's scale multiplies, one of them stores.
//
// plain_kernel, a thread a column: the same with one chain of fused multiply-adds a product.
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "cuda/convert.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/range.cuh"
#include "score/generic.hpp"

namespace misa::cuda::score {
namespace {

constexpr unsigned kWarp = 0xFFFFFFFFU;
constexpr int kMaxDim = 128;

// Queries that share a key's way into registers: one a lane to look at their ranges.
constexpr int kQueries = 32;

// At D = 128 64 registers hold the keys and 16 a group of rows; with all else that is a little more
// than the 128 a thread that a fourth block of four warps an SM would leave.
constexpr int kWarps = 4;
constexpr int kWarpKeys = 32;
constexpr int kBlocksPerSm = 3;
constexpr int kTensorKeys = kWarps * kWarpKeys;

constexpr int kPlainKeys = 64;

// Three bf16 hold the 24 bits of an fp32 mantissa.
constexpr int kSplit = 3;

struct Arguments {
  Keys keys;
  RowOperands rows;
  Columns columns;
  Scores scores;
  std::int64_t tokens;
  std::int32_t unscored;
};

// ---- rows

struct RowsArguments {
  Problem problem;
  Routing routing;
  bool routed;
  RowOperands rows;
};

// Element d of part `part` of a residual row in bf16: each part takes the leading 8 bits of what
// those before it left.
__device__ float split_part(float value, int part) {
  if (!isfinite(value)) {
    return part == 0 ? value : 0;
  }
  float high = 0;
  for (int i = 0; i <= part; ++i) {
    high = __uint_as_float(__float_as_uint(value) & 0xFFFF0000U);
    value -= high;
  }
  return high;
}

__global__ void rows_kernel(const __grid_constant__ RowsArguments arguments) {
  begin_kernel();
  const auto& [problem, routing, routed, rows] = arguments;
  const std::int64_t t = blockIdx.x;
  const auto dim = static_cast<std::int32_t>(problem.q.dim);
  const std::int32_t padded = rows.padded();
  const bool e4m3 = problem.k.dtype == DType::e4m3;

  for (std::int32_t r = threadIdx.x; r < padded; r += static_cast<std::int32_t>(blockDim.x)) {
    float weight = 0;
    if (r < rows.heads) {
      const std::int32_t head = routed ? routing.heads[t * rows.heads + r] : r;
      weight = head < 0 ? 0 : problem.w.data[t * problem.w.token_stride + head];
    } else if (r < rows.heads + rows.linear) {
      weight = e4m3 ? routing.rounded_scale[t] : 1;
    }
    rows.weight[t * padded + r] = weight;
  }

  for (std::int32_t i = threadIdx.x; i < padded * dim; i += static_cast<std::int32_t>(blockDim.x)) {
    const std::int32_t r = i / dim;
    const std::int32_t d = i % dim;
    const std::int32_t part = r - rows.heads;
    float value = 0;
    if (part < 0) {
      const std::int32_t head = routed ? routing.heads[t * rows.heads + r] : r;
      value = head < 0 ? 0
                       : element(problem.q.data, problem.q.dtype,
                                 t * problem.q.token_stride + head * problem.q.head_stride + d);
    } else if (part < rows.linear) {
      value = e4m3               ? e4m3_to_float(routing.rounded[t * dim + d])
              : rows.linear == 1 ? routing.residual[t * dim + d]
                                 : split_part(routing.residual[t * dim + d], part);
    }
    const std::int64_t at = t * padded * dim + i;
    if (rows.operand == DType::f32) {
      static_cast<float*>(rows.data)[at] = value;
    } else {
      static_cast<std::uint16_t*>(rows.data)[at] = float_to_bf16(value);
    }
  }
}

// ---- what the two scoring kernels share

// A scale that is not folded into the key multiplies the score; it is finite and not negative.
__device__ bool folds(float scale) { return !(scale >= 0 && isfinite(scale)); }

// ReLU, or nothing for the rows of the residual.
__device__ float floor_of(const RowOperands& rows, std::int32_t r) {
  return r < rows.heads ? 0 : -std::numeric_limits<float>::infinity();
}

// ---- tensor cores

// One lane's part of a key, as the matrix product wants it. Lane c of the four that share a key
// holds elements 32 i + 8 c … + 7 for every i: both operands agree on that order, so it is as good
// as any, and rows are read 16 bytes at a time.
template <int kDim>
struct KeyPart {
  static constexpr int kRegisters = kDim / 8;
  std::uint32_t pairs[kRegisters];
};

template <bool kE4m3, int kDim>
__device__ KeyPart<kDim> load_key(const Keys& keys, std::int64_t key, int c) {
  KeyPart<kDim> part;
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    const std::int64_t at = key * keys.stride + 32 * i + 8 * c;
    std::uint32_t* pairs = part.pairs + 4 * i;
    if constexpr (kE4m3) {
      const uint2 bytes =
          *reinterpret_cast<const uint2*>(static_cast<const std::uint8_t*>(keys.data) + at);
      e4m3x4_to_bf16(bytes.x, pairs[0], pairs[1]);
      e4m3x4_to_bf16(bytes.y, pairs[2], pairs[3]);
    } else {
      const uint4 four =
          *reinterpret_cast<const uint4*>(static_cast<const std::uint16_t*>(keys.data) + at);
      pairs[0] = four.x;
      pairs[1] = four.y;
      pairs[2] = four.z;
      pairs[3] = four.w;
    }
  }
  return part;
}

// Multiplies the key: exact, for the scale is infinite, NaN, or taken for its sign alone.
template <int kDim>
__device__ void fold(KeyPart<kDim>& part, float scale) {
  const float factor = isfinite(scale) ? -1.0F : scale;
  const std::uint32_t both = float_to_bf16(factor) * 0x00010001U;
#pragma unroll
  for (std::uint32_t& pair : part.pairs) {
    pair = multiply_bf16x2(pair, both);
  }
}

// The sums of weight * max(floor, row . key) of query t for the four keys of a lane: rows
// 8 g + 2 c and 8 g + 2 c + 1 of every group g.
template <int kDim>
__device__ void weighted_relu_sum(const RowOperands& rows, std::int64_t t,
                                  const KeyPart<kDim> (&keys)[4], int lane, float (&sums)[4]) {
  const std::int32_t count = rows.heads + rows.linear;
  const std::int32_t padded = rows.padded();
  const auto* data =
      static_cast<const std::uint16_t*>(rows.data) + (t * padded + lane / 4) * kDim + lane % 4 * 8;
  const float* weights = rows.weight + t * padded + lane % 4 * 2;
  for (std::int32_t first = 0; first < count; first += kRowGroup) {
    float dots[2][4] = {};
#pragma unroll
    for (int i = 0; i < kDim / 32; ++i) {
      const uint4 row = *reinterpret_cast<const uint4*>(data + first * kDim + 32 * i);
      const std::uint32_t pairs[2][2] = {{row.x, row.y}, {row.z, row.w}};
#pragma unroll
      for (int step = 0; step < 2; ++step) {
        const int at = 4 * i + 2 * step;
#pragma unroll
        for (int m = 0; m < 2; ++m) {
          const KeyPart<kDim>& upper = keys[2 * m];
          const KeyPart<kDim>& lower = keys[2 * m + 1];
          mma_bf16(dots[m],
                   {upper.pairs[at], lower.pairs[at], upper.pairs[at + 1], lower.pairs[at + 1]},
                   pairs[step]);
        }
      }
    }
    const float2 weight = *reinterpret_cast<const float2*>(weights + first);
#pragma unroll
    for (int column = 0; column < 2; ++column) {
      const std::int32_t r = first + lane % 4 * 2 + column;
      const float w = column == 0 ? weight.x : weight.y;
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const float dot = max_nan(floor_of(rows, r), dots[i / 2][i % 2 * 2 + column]);
        sums[i] = r < count ? fmaf(w, dot, sums[i]) : sums[i];
      }
    }
  }
}

// values[i], without an array in memory.
__device__ float pick(const float (&values)[4], int i) {
  const float low = i % 2 == 0 ? values[0] : values[1];
  const float high = i % 2 == 0 ? values[2] : values[3];
  return i / 2 == 0 ? low : high;
}

template <bool kE4m3, int kDim, bool kListed>
__global__ void __launch_bounds__(kWarps * 32, kBlocksPerSm)
    tensor_kernel(const __grid_constant__ Arguments arguments) {
  begin_kernel();
  const Keys& keys = arguments.keys;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int c = lane % 4;
  const std::int64_t first = std::int64_t{blockIdx.x} * kTensorKeys + threadIdx.x / 32 * kWarpKeys;

  // Step 1. With a list every lane looks at the same query.
  const std::int64_t base =
      kListed ? std::int64_t{blockIdx.y} : std::int64_t{blockIdx.y} * kQueries;
  const std::int64_t own = kListed ? base : base + lane;
  Range range{0, 0};
  if (own < arguments.tokens) {
    range = visible(keys, own);
  }
  bool sees = range.length > arguments.unscored;
  if constexpr (!kListed) {
    sees = sees && range.start < first + kWarpKeys && first < range.start + range.length;
  }
  unsigned queries = __ballot_sync(kWarp, sees);
  if (queries == 0) {
    return;
  }

  // Step 2. This lane's keys are 8 i + lane / 4 of the warp's.
  KeyPart<kDim> parts[4];
  float scales[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    std::int64_t key = first + 8 * i + lane / 4;
    bool valid = key < keys.tokens;
    if constexpr (kListed) {
      const bool in_row = key < arguments.scores.columns;
      const std::int32_t position =
          in_row ? position_of(arguments.columns, base, key, range.length) : -1;
      key = range.start + position;
      valid = position >= 0;
    }
    parts[i] = {};
    scales[i] = 1;
    if (valid) {
      parts[i] = load_key<kE4m3, kDim>(keys, key, c);
      if constexpr (kE4m3) {
        scales[i] = keys.scale[key];
        if (folds(scales[i])) {
          fold(parts[i], scales[i]);
          scales[i] = isfinite(scales[i]) ? -scales[i] : 1;
        }
      }
    }
  }

  // In the end lane c stores the score of its c-th key.
  const std::int64_t stored = first + 8 * c + lane / 4;
  const float scale = pick(scales, c);
  if constexpr (kListed) {
    queries = 1;
  }
  for (; queries != 0; queries &= queries - 1) {
    const int source = __ffs(static_cast<int>(queries)) - 1;
    const std::int64_t t = base + source;
    float sums[4] = {};
    weighted_relu_sum(arguments.rows, t, parts, lane, sums);  // step 3
#pragma unroll
    for (float& sum : sums) {  // step 4
      sum += __shfl_xor_sync(kWarp, sum, 1);
      sum += __shfl_xor_sync(kWarp, sum, 2);
    }
    const std::int32_t length = __shfl_sync(kWarp, range.length, source);
    std::int64_t column = stored;
    bool valid = false;
    if constexpr (kListed) {
      valid = column < arguments.scores.columns &&
              position_of(arguments.columns, t, column, length) >= 0;
    } else {
      column -= __shfl_sync(kWarp, range.start, source);
      valid = column >= 0 && column < length;
    }
    if (valid) {
      const float sum = pick(sums, c);
      arguments.scores.data[t * arguments.scores.columns + column] = kE4m3 ? sum * scale : sum;
    }
  }
}

// ---- CUDA cores

template <bool kListed>
__global__ void __launch_bounds__(kPlainKeys)
    plain_kernel(const __grid_constant__ Arguments arguments) {
  begin_kernel();
  __shared__ float shared[kMaxDim][kPlainKeys + 1];  // keys; the padding spreads them over banks
  __shared__ float scales[kPlainKeys];
  __shared__ std::int64_t indices[kPlainKeys];
  const auto& [keys, rows, columns, scores, tokens, unscored] = arguments;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t first = std::int64_t{blockIdx.x} * kPlainKeys;
  const std::int64_t begin =
      kListed ? std::int64_t{blockIdx.y} : std::int64_t{blockIdx.y} * kQueries;
  const std::int64_t end = kListed ? begin + 1 : min(begin + kQueries, tokens);
  const auto dim = static_cast<std::int32_t>(rows.dim);

  std::int64_t key = first + thread;
  if constexpr (kListed) {
    const Range range = visible(keys, begin);
    const bool in_row = key < scores.columns;
    const std::int32_t position = in_row ? position_of(columns, begin, key, range.length) : -1;
    key = position < 0 ? -1 : range.start + position;
  } else {
    key = key < keys.tokens ? key : -1;
  }
  indices[thread] = key;
  float scale = key >= 0 && keys.scale != nullptr ? keys.scale[key] : 1;
  float factor = 1;
  if (folds(scale)) {
    factor = isfinite(scale) ? -1 : scale;
    scale = isfinite(scale) ? -scale : 1;
  }
  scales[thread] = factor;
  __syncthreads();
  for (std::int32_t i = thread; i < kPlainKeys * dim; i += kPlainKeys) {
    const std::int32_t row = i / dim;
    const std::int32_t d = i % dim;
    const std::int64_t index = indices[row];
    const float value = index < 0 ? 0 : element(keys.data, keys.dtype, index * keys.stride + d);
    shared[d][row] = scales[row] * value;
  }
  __syncthreads();

  const std::int32_t count = rows.heads + rows.linear;
  const std::int32_t padded = rows.padded();
  for (std::int64_t t = begin; t < end; ++t) {
    const Range range = visible(keys, t);
    const std::int64_t column = kListed ? first + thread : key - range.start;
    const bool seen = key >= range.start && key < std::int64_t{range.start} + range.length;
    if (!seen || range.length <= unscored) {
      continue;
    }
    const float* data = static_cast<const float*>(rows.data) + t * padded * dim;
    float sum = 0;
    for (std::int32_t group = 0; group < count; group += kRowGroup) {
      float dots[kRowGroup] = {};
      for (std::int32_t d = 0; d < dim; ++d) {
#pragma unroll
        for (int r = 0; r < kRowGroup; ++r) {
          dots[r] = fmaf(data[(group + r) * dim + d], shared[d][thread], dots[r]);
        }
      }
#pragma unroll
      for (int r = 0; r < kRowGroup; ++r) {
        if (group + r < count) {
          const float dot = max_nan(floor_of(rows, group + r), dots[r]);
          sum = fmaf(rows.weight[t * padded + group + r], dot, sum);
        }
      }
    }
    scores.data[t * scores.columns + column] = sum * scale;
  }
}

template <class Kernel>
void launch(Kernel kernel, const Arguments& arguments, bool listed, int keys, int threads,
            void* stream) {
  const std::int64_t columns = listed ? arguments.scores.columns : arguments.keys.tokens;
  const std::int64_t rows =
      listed ? arguments.tokens : (arguments.tokens + kQueries - 1) / kQueries;
  if (columns == 0 || rows == 0) {
    return;
  }
  const dim3 grid(static_cast<unsigned>((columns + keys - 1) / keys), static_cast<unsigned>(rows));
  launch_kernel("scores", kernel, grid, threads, 0, stream, arguments);
}

template <bool kListed>
void launch_gathered(const Arguments& arguments, void* stream) {
  const auto tensor = [&](auto kernel) {
    launch(kernel, arguments, kListed, kTensorKeys, kWarps * 32, stream);
  };
  const bool e4m3 = arguments.keys.dtype == DType::e4m3;
  if (arguments.rows.operand == DType::f32) {
    launch(plain_kernel<kListed>, arguments, kListed, kPlainKeys, kPlainKeys, stream);
  } else if (arguments.rows.dim == kMaxDim) {
    e4m3 ? tensor(tensor_kernel<true, 128, kListed>) : tensor(tensor_kernel<false, 128, kListed>);
  } else {
    e4m3 ? tensor(tensor_kernel<true, 64, kListed>) : tensor(tensor_kernel<false, 64, kListed>);
  }
}

}  // namespace

RowOperands row_operands_for(const Shape& shape, std::int32_t heads, bool residual) {
  const bool plain = shape.q_dtype == DType::f32 || shape.k_dtype == DType::f32;
  const std::int32_t linear = plain || shape.k_dtype == DType::e4m3 ? 1 : kSplit;
  return {nullptr,
          nullptr,
          plain ? DType::f32 : DType::bf16,
          static_cast<std::int32_t>(shape.dim),
          heads,
          residual ? linear : 0};
}

void launch_row_operands(const Problem& problem, const Routing* routing, const RowOperands& rows,
                         void* stream) {
  constexpr int kThreads = 256;
  const RowsArguments arguments{problem, routing != nullptr ? *routing : Routing{},
                                routing != nullptr, rows};
  launch_kernel("rows of scores", rows_kernel, dim3(static_cast<unsigned>(problem.q.tokens)),
                kThreads, 0, stream, arguments);
}

void launch_generic(const Problem& problem, const RowOperands& rows, const Columns& columns,
                    std::int32_t unscored, const Scores& scores, void* stream) {
  const Arguments arguments{problem.k, rows, columns, scores, problem.q.tokens, unscored};
  columns.list != nullptr ? launch_gathered<true>(arguments, stream)
                          : launch_gathered<false>(arguments, stream);
}

}  // namespace misa::cuda::score
