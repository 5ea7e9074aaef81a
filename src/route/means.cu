// Heads (the pooled router) and blocks (HISA's filter) judged by block means: a block of threads
// serves 8 consecutive queries, a warp one of them.
//
//  1. The mean of the block that a query stands in counts only the keys that it sees, so every
//  query
//     has its own; the 8 are one tile of operands.
//  2. Queries of one run share the means of whole blocks, which pass by in tiles.
//  3. x = q . mean for 16 or 32 heads at a time: operands of the heads in registers, means as three
//     bf16 parts that hold all 24 bits of their fp32.
//  4. Energies: max(0, x) is summed over blocks, a lane two columns in eight, then over the four
//     lanes of a head, tile after tile, the query's own block last.
//     Scores: weighted and summed over the lane's heads, then over the eight lanes of a block.
//  5. |w| multiplies the energies and the warp chooses the query's heads.
//
// So the order of every sum follows from the query's own blocks and heads.
#include <cuda_runtime.h>

#include "cuda/check.cuh"
#include "cuda/range.cuh"
#include "device/alignment.hpp"
#include "pool/means.cuh"
#include "route/generic_config.cuh"
#include "route/heads.cuh"
#include "route/means.hpp"

namespace misa::cuda::route {
namespace {

enum class Judge { heads, blocks };

struct Arguments {
  Problem problem;
  pool::Means means;
  bool aligned;         // queries start on 16 bytes
  std::int32_t count;   // heads wanted
  std::int32_t* heads;  // [T, count]
  float* scores;        // [T, stride]
  std::int64_t stride;
};

// Tiles of heads that a warp multiplies at once: each load from shared memory serves all of them,
// and D / 4 registers a tile and part hold them.
template <DType type>
inline constexpr int kTiles = type == DType::f32 ? 1 : 2;

// Tiles of means multiplied at once: with two tiles of heads four independent sums.
constexpr int kPair = 2;

// The query of a warp.
struct Query {
  std::int64_t t;
  int slot;            // its place in the block
  std::int32_t whole;  // whole blocks
  bool partial;        // it stands inside a block
};

// Step 1.
template <int dim>
__device__ void store_own_mean(MeansShared<dim>& shared, const Arguments& arguments,
                               const Query& query, std::int32_t length) {
  constexpr int kStride = kQueries * operand_pitch(dim);
  const int d = static_cast<int>(threadIdx.x) % 32 * pool::kLaneElements;
  if (d >= dim) {
    return;
  }
  float mean[pool::kLaneElements] = {};
  if (query.partial) {
    const pool::Means& means = arguments.means;
    pool::mean_of(arguments.problem.k, means, means.runs[means.run_of[query.t]],
                  query.whole * means.block_pages * kPageSize, length, d, mean);
  }
  pool::store_mean(mean, d, dim, shared.own[0][query.slot], kStride);
}

// Step 2. Blocks `first` … first + count - 1 of a run.
template <int dim>
__device__ void load_tile(MeansShared<dim>& shared, const Arguments& arguments,
                          const pool::Run& run, std::int32_t first, int count) {
  const pool::Means& means = arguments.means;
  if (pool::in_tables(means, run)) {
    constexpr int kPieces = dim / 8;  // of 16 bytes
    const std::uint16_t* rows =
        means.blocks + (run.block_row + std::int64_t{first}) * kMaxParts * dim;
    for (int i = static_cast<int>(threadIdx.x); i < count * kMaxParts * kPieces; i += kThreads) {
      const int row = i / kPieces;
      copy_16(&shared.tile[row % kMaxParts][row / kMaxParts][i % kPieces * 8], rows + i * 8);
    }
    wait_for_copies();
    return;
  }
  const int d = static_cast<int>(threadIdx.x) % 32 * pool::kLaneElements;
  const std::int32_t positions = means.block_pages * kPageSize;
  for (int i = static_cast<int>(threadIdx.x) / 32; i < count && d < dim; i += kWarps) {
    float mean[pool::kLaneElements];
    pool::mean_of(arguments.problem.k, means, run, (first + i) * positions,
                  (first + i + 1) * positions, d, mean);
    pool::store_mean(mean, d, dim, shared.tile[0][i], kMeans * operand_pitch(dim));
  }
}

// Steps 3 and 4 for the heads in `rows` and the `count` blocks of the tile that the query sees.
template <DType type, int dim>
__device__ void add_energies(MeansShared<dim>& shared,
                             const HeadRows<type, dim, kTiles<type>>& rows, const Query& query,
                             int first_head, int count, bool first, bool last) {
  constexpr int kT = kTiles<type>;
  const int c = static_cast<int>(threadIdx.x) % 4;
  float energy[kT][2] = {};
  for (int key = 0; key < count; key += kPair * kTileKeys) {
    float x[kPair][kT][4] = {};
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
      add_products(rows, shared.tile[0][key + i * kTileKeys], kMaxParts,
                   kMeans * operand_pitch(dim), x[i]);
    }
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const bool valid = key + i * kTileKeys + 2 * c + e < count;
#pragma unroll
        for (int m = 0; m < kT; ++m) {
          energy[m][0] += valid ? max_nan(x[i][m][e], 0) : 0;
          energy[m][1] += valid ? max_nan(x[i][m][2 + e], 0) : 0;
        }
      }
    }
  }
  float own[kT][4] = {};
  if (last && query.partial) {
    add_products(rows, shared.own[0][0], kMaxParts, kQueries * operand_pitch(dim), own);
  }
  const int lane = static_cast<int>(threadIdx.x) % 32;
#pragma unroll
  for (int m = 0; m < kT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = first_head + m * kTileHeads + half * 8 + lane / 4;
      // The query's column of the tile of own means.
      const float x = query.slot % 2 == 0 ? own[m][2 * half] : own[m][2 * half + 1];
      const float partial = max_nan(__shfl_sync(kWarp, x, lane / 4 * 4 + query.slot / 2), 0);
      const float sum = sum_of_four(energy[m][half]);
      if (c == 0) {
        float& value = shared.values[query.slot][head];
        value = (first ? sum : value + sum) + partial;
      }
    }
  }
}

template <DType type, int dim>
__device__ void add_scores(MeansShared<dim>& shared, const HeadRows<type, dim, kTiles<type>>& rows,
                           const Problem& problem, const Query& query, int first_head, int count) {
  constexpr int kT = kTiles<type>;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float weight[kT][2];
  bool exists[kT][2];
#pragma unroll
  for (int m = 0; m < kT; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = first_head + m * kTileHeads + half * 8 + lane / 4;
      exists[m][half] = head < problem.q.heads;
      weight[m][half] =
          exists[m][half] ? problem.w.data[query.t * problem.w.token_stride + head] : 0;
    }
  }
  for (int key = 0; key < count; key += kPair * kTileKeys) {
    float x[kPair][kT][4] = {};
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
      add_products(rows, shared.tile[0][key + i * kTileKeys], kMaxParts,
                   kMeans * operand_pitch(dim), x[i]);
    }
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float score = 0;
#pragma unroll
        for (int m = 0; m < kT; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float clipped = max_nan(x[i][m][2 * half + e], 0);
            score = exists[m][half] ? __fmaf_rn(weight[m][half], clipped, score) : score;
          }
        }
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          score += __shfl_xor_sync(kWarp, score, step);
        }
        const int place = key + i * kTileKeys + 2 * lane + e;
        if (lane < 4 && place < count) {
          float& sum = shared.values[query.slot][place];
          sum = first_head == 0 ? score : sum + score;
        }
      }
    }
  }
}

template <DType type, int dim, Judge judge>
__global__ void __launch_bounds__(kThreads, kBlocksPerSmOf<type>)
    means_kernel(const __grid_constant__ Arguments arguments) {
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<MeansShared<dim>*>(memory);
  const Problem& problem = arguments.problem;
  const pool::Means& means = arguments.means;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * kQueries;
  const int queries = static_cast<int>(min(std::int64_t{kQueries}, problem.q.tokens - t0));
  const int heads = static_cast<int>(problem.q.heads);
  const int slot = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int32_t positions = means.block_pages * kPageSize;

  const std::int32_t length = slot < queries ? visible(problem.k, t0 + slot).length : 0;
  const Query query{t0 + slot, slot, length / positions, length % positions != 0};
  if constexpr (judge == Judge::heads) {
    store_own_mean(shared, arguments, query, length);
  }

  for (int first = 0, end = 0; first < queries; first = end) {
    const std::int32_t run = means.run_of[t0 + first];
    std::int32_t whole = 0;  // of the longest query
    for (end = first; end < queries && means.run_of[t0 + end] == run; ++end) {
      whole = max(whole, visible(problem.k, t0 + end).length / positions);
    }
    const bool serves = first <= slot && slot < end && length > 0;
    for (std::int32_t tile = 0; tile == 0 || tile < whole; tile += kMeans) {
      load_tile(shared, arguments, means.runs[run], tile, min(kMeans, whole - tile));
      __syncthreads();
      if (serves && (tile == 0 || tile < query.whole)) {
        const int count = min(kMeans, query.whole - tile);
        for (int head = 0; head < heads; head += kTiles<type> * kTileHeads) {
          HeadRows<type, dim, kTiles<type>> rows;
          rows.load(problem.q, arguments.aligned, query.t, head);
          if constexpr (judge == Judge::heads) {
            add_energies(shared, rows, query, head, count, tile == 0, tile + kMeans >= query.whole);
          } else {
            add_scores(shared, rows, problem, query, head, count);
          }
        }
        __syncwarp();
        if constexpr (judge == Judge::blocks) {
          for (int i = lane; i < count; i += 32) {
            arguments.scores[query.t * arguments.stride + tile + i] = shared.values[slot][i];
          }
        }
      }
      __syncthreads();
    }
  }

  if constexpr (judge == Judge::heads) {  // step 5
    std::int32_t* out = arguments.heads + query.t * arguments.count;
    if (length > 0) {
      choose_heads(
          heads, arguments.count,
          [&](int j) {
            const float w = problem.w.data[query.t * problem.w.token_stride + j];
            return fabsf(w) * shared.values[slot][j];
          },
          out, nullptr);
    } else if (slot < queries) {
      for (int i = lane; i < arguments.count; i += 32) {
        out[i] = -1;
      }
    }
  }
}

template <DType type, int dim, Judge judge>
void launch(const Arguments& arguments, cudaStream_t stream) {
  const auto kernel = means_kernel<type, dim, judge>;
  check(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                             sizeof(MeansShared<dim>)),
        "cudaFuncSetAttribute");
  const auto blocks = static_cast<unsigned>((arguments.problem.q.tokens + kQueries - 1) / kQueries);
  kernel<<<blocks, kThreads, sizeof(MeansShared<dim>), stream>>>(arguments);
  check(cudaGetLastError(), "means_kernel");
}

template <DType type, Judge judge>
void launch(const Arguments& arguments, cudaStream_t stream) {
  if (arguments.problem.q.dim == 64) {
    launch<type, 64, judge>(arguments, stream);
  } else {
    launch<type, 128, judge>(arguments, stream);
  }
}

template <Judge judge>
void launch(const Arguments& arguments, cudaStream_t stream) {
  switch (arguments.problem.q.dtype) {
    case DType::f32: return launch<DType::f32, judge>(arguments, stream);
    case DType::bf16: return launch<DType::bf16, judge>(arguments, stream);
    case DType::e4m3: return launch<DType::e4m3, judge>(arguments, stream);
  }
}

}  // namespace

void launch_pooled(const Problem& problem, const pool::Means& means, std::int32_t count,
                   std::int32_t* heads, cudaStream_t stream) {
  launch<Judge::heads>({problem, means, is_aligned(problem.q), count, heads, nullptr, 0}, stream);
}

void launch_block_scores(const Problem& problem, const pool::Means& means, float* scores,
                         std::int64_t stride, cudaStream_t stream) {
  launch<Judge::blocks>({problem, means, is_aligned(problem.q), 0, nullptr, scores, stride},
                        stream);
}

}  // namespace misa::cuda::route
