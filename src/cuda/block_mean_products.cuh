// SPDX-License-Identifier: Apache-2.0
// Heads (the pooled router) and blocks (HISA's filter) judged by block means: a warp has 32 heads
// of a query, a block of threads as many queries as its 8 warps hold.
//
//  1. The warp's heads are operands in registers; the mean of the query's own block is one in
//     shared memory.
//  2. Queries of one sequence share the means of whole blocks, which pass by in tiles: the next one
//     is copied while this one is multiplied. A row of the pool's table that holds another
//     sequence's block is computed here.
//  3. x = q . mean, from parts that hold 22 bits (fp16) or all 24 (bf16) of the means' fp32.
//  4. Energies: max(0, x) is summed over blocks, a lane two columns in eight, then over the four
//     lanes of a head; the query's own block comes last.
//     Scores: weighted and summed over the lane's heads, over the eight lanes of a block, then over
//     the query's warps.
//  5. |w| multiplies the energies and a warp chooses the query's heads.
//
// So the order of every sum follows from the query's own blocks and heads. On Hopper e4m3 heads are
// judged by route/sm90_fp8_pooled.cu and blocks by filter/sm90_fp8_block_scores.cu.
#pragma once

#include <cuda_runtime.h>

#include "cuda/block_means.cuh"
#include "cuda/heads.cuh"
#include "cuda/launch.cuh"
#include "cuda/partial_mean.cuh"
#include "cuda/range.cuh"

namespace misa::cuda::judged_by_means {

inline constexpr int kWarps = 8;
inline constexpr int kThreads = kWarps * 32;
inline constexpr int kBlocksPerSm = 2;

// fp32 queries are three operands where others are one, in registers; one block an SM leaves room.
template <DType type>
inline constexpr int kBlocksPerSmOf = type == DType::f32 ? 1 : kBlocksPerSm;

// Judging by means, a warp has two tiles of heads of a query: D / 2 registers of operands a part.
inline constexpr int kTiles = 2;
inline constexpr int kWarpHeads = kTiles * kTileHeads;

// Block means in shared memory at a time, twice for copies run ahead: two blocks an SM of 228 KB,
// and one in the 99 KB that a block may have on the smaller devices.
template <int parts>
inline constexpr int kMeans = parts == 2 ? 64 : 48;

template <int dim, int parts>
struct MeansTile {
  alignas(16) std::uint16_t rows[parts][kMeans<parts>][operand_pitch(dim)];
  float factors[kMeans<parts>];
};

template <int dim, int parts>
struct MeansShared {
  MeansTile<dim, parts> tiles[2];
  float scores[2][kWarps][kMeans<parts>];  // of a tile's blocks by a warp's heads
  float energies[kWarps][kWarpHeads];
  float weights[kWarps][kWarpHeads];
  alignas(16) std::uint16_t own[kWarps][parts][dim];  // the mean of a query's own block
};

static_assert(kBlocksPerSm * (sizeof(MeansShared<128, 3>) + 1024) <= 228 * 1024);
static_assert(kBlocksPerSm * (sizeof(MeansShared<128, 2>) + 1024) <= 228 * 1024);
static_assert(sizeof(MeansShared<128, 3>) <= 99 * 1024);

enum class Judge { heads, blocks };

struct Arguments {
  Problem problem;
  BlockMeans means;
  std::int32_t count;   // heads wanted
  std::int32_t* heads;  // [T, count]
  float* scores;        // [T, stride]
  std::int64_t stride;
};

// What a warp works at.
struct Task {
  std::int64_t t;
  int first_head;
  std::int32_t length;  // of the keys; 0 for warps without a query
};

// Step 2. Blocks first … first + count - 1 of the sequence that starts at `start`, a warp a row.
template <int dim, int parts>
__device__ void load_tile(MeansTile<dim, parts>& tile, const Arguments& arguments,
                          std::int32_t start, std::int32_t first, int count) {
  constexpr int kRowPieces = dim / 8;  // of 16 bytes
  constexpr int kRows = kMeans<parts> / kWarps;
  const BlockMeans& means = arguments.means;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t row0 = std::int64_t{start} / means.block + first;

  const auto [wanted, listed] = ask_table<kRows, kWarps>(means, start, row0, count, tile.factors);
  const std::uint32_t copied = __ballot_sync(kFullMask, listed);
  std::uint32_t computed = __ballot_sync(kFullMask, wanted && !listed);
  for (int i = 0; i < kRows; ++i) {
    if ((copied >> i & 1) != 0) {
      const int row = warp + i * kWarps;
      const std::uint16_t* from = means.blocks + (row0 + row) * parts * dim;
#pragma unroll
      for (int piece = lane; piece < parts * kRowPieces + lane; piece += 32) {
        if (piece < parts * kRowPieces) {
          copy_16(&tile.rows[piece / kRowPieces][row][piece % kRowPieces * 8], from + piece * 8);
        }
      }
    }
  }
  for (; computed != 0; computed &= computed - 1) {
    const int row = warp + (__ffs(static_cast<int>(computed)) - 1) * kWarps;
    const float factor = write_mean<parts == kFp16Parts>(
        arguments.problem.k, means, start + std::int64_t{first + row} * means.block,
        tile.rows[0][row], kMeans<parts> * operand_pitch(dim));
    if (lane == 0) {
      tile.factors[row] = factor;
    }
  }
}

// Steps 3 and 4 for the `count` blocks of the tile that the query sees.
template <DType type, bool fp16, int dim, int parts>
__device__ void add_energies(const MeansTile<dim, parts>& tile,
                             const HeadRows<type, fp16, dim, kTiles>& heads, int count,
                             float (&energy)[kTiles][2]) {
  const int c = static_cast<int>(threadIdx.x) % 4;
  for (int first = 0; first < count; first += kPair * kTileKeys) {
    float x[kPair][kTiles][4] = {};
    add_products<parts>(heads, tile.rows[0][first], operand_pitch(dim),
                        kMeans<parts> * operand_pitch(dim), x);
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int block = first + i * kTileKeys + 2 * c + e;
        if (block < count) {
          const float factor = tile.factors[block];
#pragma unroll
          for (int m = 0; m < kTiles; ++m) {
            energy[m][0] = __fmaf_rn(max_nan(x[i][m][e], 0), factor, energy[m][0]);
            energy[m][1] = __fmaf_rn(max_nan(x[i][m][2 + e], 0), factor, energy[m][1]);
          }
        }
      }
    }
  }
}

template <DType type, bool fp16, int dim, int parts>
__device__ void write_scores(const MeansTile<dim, parts>& tile,
                             const HeadRows<type, fp16, dim, kTiles>& heads,
                             const float (&weight)[kTiles][2], const bool (&exists)[kTiles][2],
                             int count, float (&scores)[kMeans<parts>]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int first = 0; first < count; first += kPair * kTileKeys) {
    float x[kPair][kTiles][4] = {};
    add_products<parts>(heads, tile.rows[0][first], operand_pitch(dim),
                        kMeans<parts> * operand_pitch(dim), x);
#pragma unroll
    for (int i = 0; i < kPair; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float score = 0;
#pragma unroll
        for (int m = 0; m < kTiles; ++m) {
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            const float clipped = max_nan(x[i][m][2 * half + e], 0);
            score = exists[m][half] ? __fmaf_rn(weight[m][half], clipped, score) : score;
          }
        }
#pragma unroll
        for (int step = 4; step < 32; step *= 2) {
          score += __shfl_xor_sync(kFullMask, score, step);
        }
        const int block = first + i * kTileKeys + 2 * lane + e;
        if (lane < 4 && block < count) {
          scores[block] = score * tile.factors[block];
        }
      }
    }
  }
}

// Starts copies of the weights of a warp's heads.
__device__ inline void load_weights(float (&weights)[kWarpHeads], const Weights& w, int heads,
                                    const Task& task) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (const int head = task.first_head + lane; head < heads) {
    copy_4(&weights[lane], w.data + task.t * w.token_stride + head);
  }
}

// Step 4's end: the query's own block, the sums over lanes and the weights.
template <int parts, DType type, bool fp16, int dim>
__device__ void write_energies(const std::uint16_t (&own)[parts][dim], float partial_factor,
                               const float (&weights)[kWarpHeads],
                               const HeadRows<type, fp16, dim, kTiles>& heads,
                               const float (&energy)[kTiles][2], float (&energies)[kWarpHeads]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float x[1][kTiles][4] = {};
  if (partial_factor != 0) {
    add_products<parts>(heads, own[0], 0, dim, x);  // all columns are the one row
  }
#pragma unroll
  for (int m = 0; m < kTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum =
          __fmaf_rn(max_nan(x[0][m][2 * half], 0), partial_factor, sum_of_four(energy[m][half]));
      if (lane % 4 == 0) {
        const int head = m * kTileHeads + half * 8 + lane / 4;
        energies[head] = fabsf(weights[head]) * sum;
      }
    }
  }
}

template <DType type, bool fp16, int dim, Judge judge>
__global__ void __launch_bounds__(kThreads, kBlocksPerSmOf<type>)
    means_kernel(const __grid_constant__ Arguments arguments) {
  begin_kernel();
  constexpr int kMeanParts = cuda::kMeanParts<fp16>;
  constexpr int kRows = kMeans<kMeanParts>;
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<MeansShared<dim, kMeanParts>*>(memory);
  const Problem& problem = arguments.problem;
  const int heads = static_cast<int>(problem.q.heads);
  const int groups = (heads + kWarpHeads - 1) / kWarpHeads;  // warps a query
  const int slots = kWarps / groups;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * slots;
  const int queries = static_cast<int>(min(std::int64_t{slots}, problem.q.tokens - t0));
  const int slot = warp / groups;

  const Range range = range_of_lane(problem.k, t0, queries);
  const std::int32_t blocks = range.length / arguments.means.block;
  const Task task{t0 + slot, warp % groups * kWarpHeads,
                  __shfl_sync(kFullMask, range.length, slot)};
  HeadRows<type, fp16, dim, kTiles> rows;  // step 1
  [[maybe_unused]] float weight[kTiles][2] = {};
  [[maybe_unused]] bool exists[kTiles][2] = {};
  [[maybe_unused]] float energy[kTiles][2] = {};
  [[maybe_unused]] float partial_factor = 0;  // 0: the query stands in no block
  if (slot < queries) {
    rows.load(problem.q, task.t, task.first_head);
    if constexpr (judge == Judge::heads) {
      load_weights(shared.weights[warp], problem.w, heads, task);
      if (task.length % arguments.means.block != 0) {
        partial_factor = store_partial_mean<fp16, dim>(
            load_partial_mean<dim>(arguments.means, task.t), shared.own[warp][0], dim);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kTiles * 2; ++i) {
        const int head = task.first_head + i * 8 + lane / 4;
        exists[i / 2][i % 2] = head < heads;
        weight[i / 2][i % 2] =
            head < heads ? problem.w.data[task.t * problem.w.token_stride + head] : 0;
      }
    }
  }

  for (int first = 0, end = 0; first < queries; first = end) {
    const QueryRun run(first, range, blocks);
    const std::int32_t whole = run.whole;
    const std::int32_t own_whole = __shfl_sync(kFullMask, run.own, slot);
    end = run.end;
    for (std::int32_t tile = -kRows; tile < whole; tile += kRows) {
      const std::int32_t next = tile + kRows;
      if (next < whole) {
        load_tile(shared.tiles[next / kRows % 2], arguments, run.start, next,
                  min(kRows, whole - next));
      }
      commit_copies();
      if (tile < 0) {
        continue;
      }
      wait_for_copies<1>();
      __syncthreads();
      const int buffer = tile / kRows % 2;
      const int count = min(kRows, own_whole - tile);
      if constexpr (judge == Judge::heads) {
        add_energies(shared.tiles[buffer], rows, count, energy);
        __syncthreads();
      } else {
        write_scores(shared.tiles[buffer], rows, weight, exists, count,
                     shared.scores[buffer][warp]);
        __syncthreads();
        // The first of a query's warps adds up what they wrote.
        for (int i = warp % groups * 32 + lane; i < count; i += groups * 32) {
          float score = shared.scores[buffer][slot * groups][i];
          for (int group = 1; group < groups; ++group) {
            score += shared.scores[buffer][slot * groups + group][i];
          }
          arguments.scores[task.t * arguments.stride + tile + i] = score;
        }
      }
    }
  }

  if constexpr (judge == Judge::heads) {  // step 5
    wait_for_copies<0>();
    __syncwarp();
    if (task.length > 0) {
      write_energies(shared.own[warp], partial_factor, shared.weights[warp], rows, energy,
                     shared.energies[warp]);
    }
    __syncthreads();
    if (slot >= queries || warp % groups != 0) {
      return;
    }
    std::int32_t* out = arguments.heads + task.t * arguments.count;
    if (task.length > 0) {
      choose_heads<kMaxHeads>(
          heads, arguments.count,
          [&](int j) { return shared.energies[warp + j / kWarpHeads][j % kWarpHeads]; }, out,
          nullptr);
    } else {
      for (int i = lane; i < arguments.count; i += 32) {
        out[i] = -1;
      }
    }
  }
}

template <DType type, bool fp16, int dim, Judge judge>
void launch(const Arguments& arguments, cudaStream_t stream) {
  constexpr int kBytes = sizeof(MeansShared<dim, kMeanParts<fp16>>);
  const auto kernel = means_kernel<type, fp16, dim, judge>;
  const Queries& q = arguments.problem.q;
  const std::int64_t slots = kWarps / ((q.heads + kWarpHeads - 1) / kWarpHeads);
  const auto blocks = static_cast<unsigned>((q.tokens + slots - 1) / slots);
  launch_kernel("pooled routing", kernel, dim3(blocks), kThreads, kBytes, stream, arguments);
}

template <DType type, bool fp16, Judge judge>
void launch(const Arguments& arguments, cudaStream_t stream) {
  if (arguments.problem.q.dim == 64) {
    launch<type, fp16, 64, judge>(arguments, stream);
  } else {
    launch<type, fp16, 128, judge>(arguments, stream);
  }
}

template <Judge judge>
void launch(const Arguments& arguments, cudaStream_t stream) {
  switch (arguments.problem.q.dtype) {
    case DType::f32: return launch<DType::f32, false, judge>(arguments, stream);
    case DType::bf16: return launch<DType::bf16, false, judge>(arguments, stream);
    case DType::e4m3:
      return arguments.means.fp16 ? launch<DType::e4m3, true, judge>(arguments, stream)
                                  : launch<DType::e4m3, false, judge>(arguments, stream);
  }
}

}  // namespace misa::cuda::judged_by_means
