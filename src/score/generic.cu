// SPDX-License-Identifier: Apache-2.0
// Scores on the tensor cores (bf16 operands, fp32 sums), or on the CUDA cores where q or k is f32.
//
// tensor_core_kernel, 32 columns per warp:
//  1. Finds its queries. If columns are keys, these are the queries of the thread block, up to 32,
//     that see any of the warp's keys; if columns are gathered, it is one query. Paged keys are
//     always gathered: then no grid has to cover the indices of the keys of all sequences.
//  2. Loads its keys into registers as bf16. A negative or non-finite scale is folded into them. A
//     key's sketch is read in its place, or encoded from it into shared memory first.
//  3. Multiplies the 32 keys with each query's rows in groups of 8. The products are clipped at the
//     rows' floors, weighted, and added in order of the rows.
//  4. Adds the sums of the four lanes that share a key, multiplies by the key's scale, and stores
//     from one of these lanes.
//
// cuda_core_kernel, one column per thread: the same, each product one chain of multiply-adds.
#include <cuda_runtime.h>

#include <cstdint>
#include <limits>

#include "cuda/columns.cuh"
#include "cuda/convert.cuh"
#include "cuda/elements.cuh"
#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/ptx/mma.cuh"
#include "cuda/sketch.cuh"
#include "cuda/warp.cuh"
#include "score/generic.hpp"
#include "score/sketch_keys.cuh"

namespace misa::cuda::score {
namespace {

constexpr int kMaxDim = 128;

// Queries for which a warp loads its keys once: one per lane, which checks the query's range.
constexpr int kQueries = 32;

// At D = 128 the keys take 64 registers and a group of rows 16. With everything else this is a
// little more than the 128 registers per thread that would allow a fourth thread block per SM.
constexpr int kWarps = 4;
constexpr int kWarpKeys = 32;
constexpr int kBlocksPerSm = 3;
constexpr int kTensorCoreKeys = kWarps * kWarpKeys;

constexpr int kCudaCoreKeys = 64;

template <class Source>
struct ScoreArguments {
  Source keys;
  RowOperands rows;
  Columns columns;
  Scores scores;
  std::int64_t tokens;
  std::int32_t unscored;
  int sketch;  // bits of the sketch that is scored in place of the keys, or 0
};

// ---- shared by the two scoring kernels

// Whether the scale is folded into the key. Any other scale, finite and not negative, multiplies
// the score.
__device__ bool is_folded(float scale) { return !(scale >= 0 && isfinite(scale)); }

// Where a row's products are clipped: at 0 (ReLU) for heads, nowhere for the residual row.
__device__ float floor_of(const RowOperands& rows, std::int32_t r) {
  return r < rows.heads ? 0 : -std::numeric_limits<float>::infinity();
}

// ---- tensor cores

// What the tensor cores multiply with the rows.
enum class Keys : std::uint8_t { bf16, e4m3, sketch };

// A lane's fragment of a key. Lane c of the four that share a key holds elements 32 i + 8 c … + 7
// for every i. The MMA numbers elements differently, but any order will do if both operands have
// the same one. In this order rows are read 16 bytes at a time.
template <int kDim>
struct KeyFragment {
  static constexpr int kRegisters = kDim / 8;
  std::uint32_t pairs[kRegisters];
};

template <bool kE4m3, int kDim, class Source>
__device__ KeyFragment<kDim> load_key(const Source& keys, std::int64_t key, int c) {
  constexpr DType type = kE4m3 ? DType::e4m3 : DType::bf16;
  const std::byte* row = key_address<type>(keys, key);
  KeyFragment<kDim> fragment;
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    const std::byte* elements = row + (32 * i + 8 * c) * static_cast<int>(size_of(type));
    std::uint32_t* pairs = fragment.pairs + 4 * i;
    if constexpr (kE4m3) {
      const uint2 bytes = *reinterpret_cast<const uint2*>(elements);
      e4m3x4_to_bf16(bytes.x, pairs[0], pairs[1]);
      e4m3x4_to_bf16(bytes.y, pairs[2], pairs[3]);
    } else {
      const uint4 words = *reinterpret_cast<const uint4*>(elements);
      pairs[0] = words.x;
      pairs[1] = words.y;
      pairs[2] = words.z;
      pairs[3] = words.w;
    }
  }
  return fragment;
}

// The same of the key's sketch, and its factor.
template <int kDim>
__device__ KeyFragment<kDim> load_sketch(int sketch, const SketchBytes& from, int c,
                                         float& factor) {
  KeyFragment<kDim> fragment{};
  factor = __uint_as_float(0x7FFFFFFFU);  // NaN
  if (from.codes == nullptr) {
    return fragment;
  }
  factor = sketch_factor(sketch, from.scales, kDim);
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    std::uint32_t pairs[4];
    decode_sketch(sketch, from, 32 * i + 8 * c, kDim, pairs);
#pragma unroll
    for (int pair = 0; pair < 4; ++pair) {
      fragment.pairs[4 * i + pair] = pairs[pair];
    }
  }
  return fragment;
}

// Multiplies the key by a scale that is_folded: by its sign if it is finite, so this is exact.
template <int kDim>
__device__ void fold(KeyFragment<kDim>& fragment, float scale) {
  const float factor = isfinite(scale) ? -1.0F : scale;
  const std::uint32_t factors = float_to_bf16(factor) * 0x00010001U;
#pragma unroll
  for (std::uint32_t& pair : fragment.pairs) {
    pair = multiply_bf16x2(pair, factors);
  }
}

// Adds weight * max(floor, row . key) for the four keys of lane c, over rows 8 g + 2 c and
// 8 g + 2 c + 1 of every group g of query t's rows.
template <int kDim>
__device__ void weighted_relu_sum(const RowOperands& rows, std::int64_t t,
                                  const KeyFragment<kDim> (&keys)[4], int lane, float (&sums)[4]) {
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
          const KeyFragment<kDim>& upper = keys[2 * m];
          const KeyFragment<kDim>& lower = keys[2 * m + 1];
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

// values[i] with i unknown at compile time, without moving the array to local memory.
__device__ float pick(const float (&values)[4], int i) {
  const float low = i % 2 == 0 ? values[0] : values[1];
  const float high = i % 2 == 0 ? values[2] : values[3];
  return i / 2 == 0 ? low : high;
}

template <class Source, Keys kKeys, int kDim, bool kGathered>
__global__ void __launch_bounds__(kWarps * 32, kBlocksPerSm)
    tensor_core_kernel(const __grid_constant__ ScoreArguments<Source> arguments) {
  begin_kernel();
  const Source& keys = arguments.keys;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int c = lane % 4;
  const std::int64_t first =
      std::int64_t{blockIdx.x} * kTensorCoreKeys + threadIdx.x / 32 * kWarpKeys;

  // Step 1. If columns are gathered, every lane has the same query.
  const std::int64_t base =
      kGathered ? std::int64_t{blockIdx.y} : std::int64_t{blockIdx.y} * kQueries;
  const std::int64_t query = kGathered ? base : base + lane;
  Range range{0, 0};
  if (query < arguments.tokens) {
    range = visible(keys, query);
  }
  bool sees = range.length > arguments.unscored;
  if constexpr (!kGathered) {
    sees = sees && range.start < first + kWarpKeys && first < range.start + range.length;
  } else if constexpr (kPaged<Source>) {  // the grid has room for the longest row
    sees = sees && first < range.length;
  }
  unsigned queries = __ballot_sync(kFullMask, sees);
  if (queries == 0) {
    return;
  }

  // Step 2. The lane's keys are keys 8 i + lane / 4 of the warp's 32.
  KeyFragment<kDim> fragments[4];
  float scales[4];
  const auto key_at = [&](std::int64_t column) -> std::int64_t {  // -1: none
    if constexpr (kGathered) {
      const bool in_row = column < arguments.scores.columns;
      const std::int32_t position =
          in_row ? position_of(arguments.columns, base, column, range.length) : -1;
      return position >= 0 ? range.start + position : -1;
    } else {
      return column < keys.tokens ? column : -1;
    }
  };
  // `load` gives the fragment of key i of the lane and its scale.
  const auto load_keys = [&](const auto& load) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const std::int64_t key = key_at(first + 8 * i + lane / 4);
      fragments[i] = {};
      scales[i] = 1;
      if (key >= 0) {
        fragments[i] = load(i, key, scales[i]);
        if (is_folded(scales[i])) {
          fold(fragments[i], scales[i]);
          scales[i] = isfinite(scales[i]) ? -scales[i] : 1;
        }
      }
    }
  };
  if constexpr (kKeys == Keys::sketch) {
    __shared__ EncodedKeys<kTensorCoreKeys> encoded;
    const int warp_first = static_cast<int>(threadIdx.x) / 32 * kWarpKeys;
    if (!has_sketch(keys)) {
      encode_keys(keys, arguments.sketch, kDim, key_at(first + lane), warp_first, encoded);
    }
    load_keys([&](int i, std::int64_t key, float& factor) {
      const int place = warp_first + 8 * i + lane / 4;
      return load_sketch<kDim>(arguments.sketch,
                               sketch_of(keys, arguments.sketch, kDim, key, encoded, place), c,
                               factor);
    });
  } else {
    load_keys([&](int /*i*/, std::int64_t key, float& scale) {
      if constexpr (kKeys == Keys::e4m3) {
        scale = key_scale<DType::e4m3>(keys, key);
      }
      return load_key<kKeys == Keys::e4m3, kDim>(keys, key, c);
    });
  }

  // Lane c of the four that share keys stores the scores of its c-th key.
  const std::int64_t stored = first + 8 * c + lane / 4;
  const float scale = pick(scales, c);
  if constexpr (kGathered) {
    queries = 1;
  }
  for (; queries != 0; queries &= queries - 1) {
    const int source = __ffs(static_cast<int>(queries)) - 1;
    const std::int64_t t = base + source;
    float sums[4] = {};
    weighted_relu_sum(arguments.rows, t, fragments, lane, sums);  // step 3
#pragma unroll
    for (float& sum : sums) {  // step 4
      sum += __shfl_xor_sync(kFullMask, sum, 1);
      sum += __shfl_xor_sync(kFullMask, sum, 2);
    }
    const std::int32_t length = __shfl_sync(kFullMask, range.length, source);
    std::int64_t column = stored;
    bool valid = false;
    if constexpr (kGathered) {
      valid = column < arguments.scores.columns &&
              position_of(arguments.columns, t, column, length) >= 0;
    } else {
      column -= __shfl_sync(kFullMask, range.start, source);
      valid = column >= 0 && column < length;
    }
    if (valid) {
      const float sum = pick(sums, c);
      arguments.scores.data[t * arguments.scores.columns + column] =
          kKeys == Keys::bf16 ? sum : sum * scale;
    }
  }
}

// ---- CUDA cores

template <class Source, bool kGathered, bool kSketched>
__global__ void __launch_bounds__(kCudaCoreKeys)
    cuda_core_kernel(const __grid_constant__ ScoreArguments<Source> arguments) {
  begin_kernel();
  __shared__ float shared[kMaxDim][kCudaCoreKeys + 1];  // keys; the padding avoids bank conflicts
  __shared__ float scales[kCudaCoreKeys];
  __shared__ std::int64_t indices[kCudaCoreKeys];
  const auto& [keys, rows, columns, scores, tokens, unscored, sketch] = arguments;
  const int thread = static_cast<int>(threadIdx.x);
  const std::int64_t first = std::int64_t{blockIdx.x} * kCudaCoreKeys;
  const std::int64_t begin =
      kGathered ? std::int64_t{blockIdx.y} : std::int64_t{blockIdx.y} * kQueries;
  const std::int64_t end = kGathered ? begin + 1 : min(begin + kQueries, tokens);
  const auto dim = static_cast<std::int32_t>(rows.dim);
  if constexpr (kPaged<Source>) {  // the grid has room for the longest row
    if (first >= visible(keys, begin).length) {
      return;
    }
  }

  std::int64_t key = first + thread;
  if constexpr (kGathered) {
    const Range range = visible(keys, begin);
    const bool in_row = key < scores.columns;
    const std::int32_t position = in_row ? position_of(columns, begin, key, range.length) : -1;
    key = position < 0 ? -1 : range.start + position;
  } else {
    key = key < keys.tokens ? key : -1;
  }
  indices[thread] = key;
  float scale = 1;
  // Sets the scale, or else folds it.
  const auto set_scale = [&](float value) {
    scale = is_folded(value) ? (isfinite(value) ? -value : 1) : value;
    scales[thread] = is_folded(value) ? (isfinite(value) ? -1 : value) : 1;
  };
  if constexpr (kSketched) {
    __shared__ EncodedKeys<kCudaCoreKeys> encoded;
    if (!has_sketch(keys)) {
      encode_keys(keys, sketch, dim, key, thread / 32 * 32, encoded);
    }
    SketchBytes bytes{nullptr, nullptr};
    if (key >= 0) {
      bytes = sketch_of(keys, sketch, dim, key, encoded, thread);
    }
    const bool exists = bytes.codes != nullptr;
    set_scale(exists ? sketch_factor(sketch, bytes.scales, dim) : __uint_as_float(0x7FFFFFFFU));
    for (std::int32_t d = 0; d < dim; d += 8) {
      std::uint32_t pairs[4] = {};
      if (exists) {
        decode_sketch(sketch, bytes, d, dim, pairs);
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        shared[d + 2 * i][thread] = scales[thread] * __uint_as_float(pairs[i] << 16);
        shared[d + 2 * i + 1][thread] = scales[thread] * __uint_as_float(pairs[i] & 0xFFFF0000U);
      }
    }
  } else {
    set_scale(key >= 0 && has_scales(keys) ? key_scale<DType::e4m3>(keys, key) : 1);
    __syncthreads();
    for (std::int32_t i = thread; i < kCudaCoreKeys * dim; i += kCudaCoreKeys) {
      const std::int32_t row = i / dim;
      const std::int32_t d = i % dim;
      const std::int64_t index = indices[row];
      float value = 0;
      if (index >= 0) {
        with_dtype(keys.dtype,
                   [&]<DType type>() { value = element(key_address<type>(keys, index), type, d); });
      }
      shared[d][row] = scales[row] * value;
    }
  }
  __syncthreads();

  const std::int32_t count = rows.heads + rows.linear;
  const std::int32_t padded = rows.padded();
  for (std::int64_t t = begin; t < end; ++t) {
    const Range range = visible(keys, t);
    const std::int64_t column = kGathered ? first + thread : key - range.start;
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

template <bool kGathered, class Kernel, class Source>
void launch(Kernel kernel, const ScoreArguments<Source>& arguments, int keys, int threads,
            void* stream) {
  std::int64_t columns = arguments.scores.columns;
  std::int64_t rows = arguments.tokens;
  if constexpr (!kGathered) {
    columns = arguments.keys.tokens;
    rows = (rows + kQueries - 1) / kQueries;
  }
  if (columns == 0 || rows == 0) {
    return;
  }
  const dim3 grid(static_cast<unsigned>((columns + keys - 1) / keys), static_cast<unsigned>(rows));
  launch_kernel("scores", kernel, grid, threads, 0, stream, arguments);
}

template <bool kGathered, class Source>
void launch_scores(const ScoreArguments<Source>& arguments, void* stream) {
  const auto tensor = [&]<Keys kKeys>() {
    const auto kernel = arguments.rows.dim == kMaxDim
                            ? tensor_core_kernel<Source, kKeys, kMaxDim, kGathered>
                            : tensor_core_kernel<Source, kKeys, 64, kGathered>;
    launch<kGathered>(kernel, arguments, kTensorCoreKeys, kWarps * 32, stream);
  };
  const bool sketched = arguments.sketch != 0;
  if (arguments.rows.operand == DType::f32) {
    launch<kGathered>(sketched ? cuda_core_kernel<Source, kGathered, true>
                               : cuda_core_kernel<Source, kGathered, false>,
                      arguments, kCudaCoreKeys, kCudaCoreKeys, stream);
  } else if (sketched) {
    tensor.template operator()<Keys::sketch>();
  } else if (arguments.keys.dtype == DType::e4m3) {
    tensor.template operator()<Keys::e4m3>();
  } else if constexpr (!kPaged<Source>) {
    tensor.template operator()<Keys::bf16>();
  }
}

}  // namespace

template <class Source>
void launch_generic(const ProblemOf<Source>& problem, const RowOperands& rows,
                    const Columns& columns, std::int32_t unscored, int sketch, const Scores& scores,
                    void* stream) {
  const ScoreArguments<Source> arguments{problem.k,        rows,     columns, scores,
                                         problem.q.tokens, unscored, sketch};
  if constexpr (!kPaged<Source>) {
    if (columns.list == nullptr) {
      return launch_scores<false>(arguments, stream);
    }
  }
  launch_scores<true>(arguments, stream);
}

template void launch_generic(const Problem&, const RowOperands&, const Columns&, std::int32_t, int,
                             const Scores&, void*);
template void launch_generic(const PagedProblem&, const RowOperands&, const Columns&, std::int32_t,
                             int, const Scores&, void*);

}  // namespace misa::cuda::score
