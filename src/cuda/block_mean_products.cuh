// SPDX-License-Identifier: Apache-2.0
// Products of query heads with block means, for the pooled router (head energies) and for HISA's
// block filter (block scores). A warp has 32 heads of a query; a thread block has as many queries
// as its 8 warps can hold.
//
//  1. The warp's heads are operands in registers; the query's partial block mean is one in shared
//     memory.
//  2. Queries whose keys start at the same key share the means of whole blocks, tile by tile: while
//     one tile is multiplied the next is copied. Where a table row holds the block of another
//     sequence, the mean is computed here; a table of given means has no such rows.
//  3. x = q . mean, from parts that hold 22 bits (fp16) or all 24 bits (bf16) of the fp32 mean.
//  4. Energies: a lane sums max(0, x) over two of every eight blocks, then the quad of a head adds
//     up; the partial block is added last.
//     Scores: w max(0, x) is summed over the lane's heads, over the eight lanes that hold a block,
//     then over the query's warps.
//  5. Energies are multiplied by |w|, and a warp chooses the query's heads.
//
// If there are few queries, several thread blocks divide the tiles of their scores among them.
//
// So the order of every sum depends only on the query's blocks and heads. For e4m3 queries and keys
// on Hopper, route/sm90_fp8_pooled.cu and filter/sm90_fp8_block_scores.cu do the same.
#pragma once

#include <cuda_runtime.h>

#include "cuda/block_means.cuh"
#include "cuda/heads.cuh"
#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"
#include "cuda/partial_mean.cuh"

namespace misa::cuda::block_mean_products {

inline constexpr int kWarps = 8;
inline constexpr int kThreads = kWarps * 32;
inline constexpr int kBlocksPerSm = 2;

// fp32 queries take three times the registers of others, so an SM has one thread block of them.
template <DType type>
inline constexpr int kBlocksPerSmOf = type == DType::f32 ? 1 : kBlocksPerSm;

// Two tiles of heads per warp. Their operands take D / 2 registers per lane for each part.
inline constexpr int kHeadTiles = 2;
inline constexpr int kWarpHeads = kHeadTiles * kMmaHeads;

// Block means in a tile. Two tiles leave room for two thread blocks in the 228 KB of an SM, and fit
// the 99 KB that a thread block may have on smaller devices.
template <int parts>
inline constexpr int kTileMeans = parts == 2 ? 64 : 48;

template <int dim, int parts>
struct MeansTile {
  alignas(16) std::uint16_t rows[parts][kTileMeans<parts>][operand_pitch(dim)];
  float factors[kTileMeans<parts>];
};

template <int dim, int parts>
struct MeansShared {
  MeansTile<dim, parts> tiles[2];
  float scores[2][kWarps][kTileMeans<parts>];  // of a tile's blocks, summed over a warp's heads
  float energies[kWarps][kWarpHeads];
  float weights[kWarps][kWarpHeads];
  alignas(16) std::uint16_t partial[kWarps][parts][dim];  // the query's partial block mean
};

static_assert(kBlocksPerSm * (sizeof(MeansShared<128, 3>) + 1024) <= 228 * 1024);
static_assert(kBlocksPerSm * (sizeof(MeansShared<128, 2>) + 1024) <= 228 * 1024);
static_assert(sizeof(MeansShared<128, 3>) <= 99 * 1024);

enum class MeansOutput { head_energies, block_scores };

template <class Source>
struct MeansArguments {
  ProblemOf<Source> problem;
  BlockMeanTable means;
  std::int32_t count;   // heads to choose
  std::int32_t* heads;  // [T, count]
  float* scores;        // [T, stride]
  std::int64_t stride;
};

// A warp's query and heads.
struct WarpTask {
  std::int64_t t;
  int first_head;
  std::int32_t length;  // keys that the query sees; 0 for warps without a query
};

// Step 2: starts to copy the means of blocks first … first + count - 1 of a sequence, one row per
// warp at a time.
template <bool given, int dim, int parts, class Source>
__device__ void load_means_tile(MeansTile<dim, parts>& tile,
                                const MeansArguments<Source>& arguments,
                                std::int32_t sequence_start, std::int32_t first, int count) {
  constexpr int kRowChunks = dim / 8;  // of 16 bytes
  constexpr int kWarpRows = kTileMeans<parts> / kWarps;
  const BlockMeanTable& means = arguments.means;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t first_row = base_row(means, std::int64_t{sequence_start}) + first;

  const auto [wanted, found] =
      look_up_rows<kWarpRows, kWarps, given>(means, sequence_start, first_row, count, tile.factors);
  const std::uint32_t found_rows = __ballot_sync(kFullMask, found);
  [[maybe_unused]] std::uint32_t missing_rows = __ballot_sync(kFullMask, wanted && !found);
  for (int i = 0; i < kWarpRows; ++i) {
    if ((found_rows >> i & 1) != 0) {
      const int row = warp + i * kWarps;
      const std::uint16_t* from = means.rows + (first_row + row) * parts * dim;
#pragma unroll
      for (int chunk = lane; chunk < parts * kRowChunks + lane; chunk += 32) {
        if (chunk < parts * kRowChunks) {
          copy_16(&tile.rows[chunk / kRowChunks][row][chunk % kRowChunks * 8], from + chunk * 8);
        }
      }
    }
  }
  if constexpr (!given) {
    for (; missing_rows != 0; missing_rows &= missing_rows - 1) {
      const int row = warp + (__ffs(static_cast<int>(missing_rows)) - 1) * kWarps;
      const float factor = write_mean<parts == kFp16Parts>(
          arguments.problem.k, means, sequence_start + std::int64_t{first + row} * means.block,
          tile.rows[0][row], kTileMeans<parts> * operand_pitch(dim));
      if (lane == 0) {
        tile.factors[row] = factor;
      }
    }
  }
}

// Steps 3 and 4: adds the energies of the tile's first `count` blocks, which the query sees.
template <DType type, bool fp16, int dim, int parts>
__device__ void add_energies(const MeansTile<dim, parts>& tile,
                             const HeadOperands<type, fp16, dim, kHeadTiles>& heads, int count,
                             float (&energy)[kHeadTiles][2]) {
  const int c = static_cast<int>(threadIdx.x) % 4;
  for (int first = 0; first < count; first += kColumnTiles * kMmaColumns) {
    float x[kColumnTiles][kHeadTiles][4] = {};
    add_products<parts>(heads, tile.rows[0][first], operand_pitch(dim),
                        kTileMeans<parts> * operand_pitch(dim), x);
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int block = first + i * kMmaColumns + 2 * c + e;
        if (block < count) {
          const float factor = tile.factors[block];
#pragma unroll
          for (int m = 0; m < kHeadTiles; ++m) {
            energy[m][0] = __fmaf_rn(max_nan(x[i][m][e], 0), factor, energy[m][0]);
            energy[m][1] = __fmaf_rn(max_nan(x[i][m][2 + e], 0), factor, energy[m][1]);
          }
        }
      }
    }
  }
}

// Steps 3 and 4: writes the scores of the tile's first `count` blocks from the warp's heads.
template <DType type, bool fp16, int dim, int parts>
__device__ void write_warp_scores(const MeansTile<dim, parts>& tile,
                                  const HeadOperands<type, fp16, dim, kHeadTiles>& heads,
                                  const float (&weight)[kHeadTiles][2],
                                  const bool (&exists)[kHeadTiles][2], int count,
                                  float (&scores)[kTileMeans<parts>]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  for (int first = 0; first < count; first += kColumnTiles * kMmaColumns) {
    float x[kColumnTiles][kHeadTiles][4] = {};
    add_products<parts>(heads, tile.rows[0][first], operand_pitch(dim),
                        kTileMeans<parts> * operand_pitch(dim), x);
#pragma unroll
    for (int i = 0; i < kColumnTiles; ++i) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        float score = 0;
#pragma unroll
        for (int m = 0; m < kHeadTiles; ++m) {
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
        const int block = first + i * kMmaColumns + 2 * lane + e;
        if (lane < 4 && block < count) {
          scores[block] = score * tile.factors[block];
        }
      }
    }
  }
}

// Starts to copy the weights of a warp's heads.
__device__ inline void copy_weights(float (&weights)[kWarpHeads], const Weights& w, int heads,
                                    const WarpTask& task) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  if (const int head = task.first_head + lane; head < heads) {
    copy_4(&weights[lane], w.data + task.t * w.token_stride + head);
  }
}

// Steps 4 and 5: adds up over the quad, adds the partial block and multiplies by |w|.
template <int parts, DType type, bool fp16, int dim>
__device__ void write_energies(const std::uint16_t (&partial)[parts][dim], float partial_factor,
                               const float (&weights)[kWarpHeads],
                               const HeadOperands<type, fp16, dim, kHeadTiles>& heads,
                               const float (&energy)[kHeadTiles][2],
                               float (&energies)[kWarpHeads]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float x[1][kHeadTiles][4] = {};
  if (partial_factor != 0) {
    add_products<parts>(heads, partial[0], 0, dim, x);  // pitch 0: all columns are the same mean
  }
#pragma unroll
  for (int m = 0; m < kHeadTiles; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float sum =
          __fmaf_rn(max_nan(x[0][m][2 * half], 0), partial_factor, quad_sum(energy[m][half]));
      if (lane % 4 == 0) {
        const int head = m * kMmaHeads + half * 8 + lane / 4;
        energies[head] = fabsf(weights[head]) * sum;
      }
    }
  }
}

template <class Source, DType type, bool fp16, int dim, MeansOutput output, bool given>
__global__ void __launch_bounds__(kThreads, kBlocksPerSmOf<type>)
    mean_products_kernel(const __grid_constant__ MeansArguments<Source> arguments) {
  begin_kernel();
  constexpr int kMeanParts = cuda::kMeanParts<fp16>;
  constexpr int kRows = kTileMeans<kMeanParts>;
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<MeansShared<dim, kMeanParts>*>(memory);
  const ProblemOf<Source>& problem = arguments.problem;
  const int heads = static_cast<int>(problem.q.heads);
  const int query_warps = (heads + kWarpHeads - 1) / kWarpHeads;
  const int block_queries = kWarps / query_warps;  // per thread block
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * block_queries;
  const int queries = static_cast<int>(min(std::int64_t{block_queries}, problem.q.tokens - t0));
  const int query = warp / query_warps;

  const Range range = range_of_lane(problem.k, t0, queries);
  const std::int32_t blocks = range.length / arguments.means.block;
  const WarpTask task{t0 + query, warp % query_warps * kWarpHeads,
                      __shfl_sync(kFullMask, range.length, query)};
  HeadOperands<type, fp16, dim, kHeadTiles> operands;  // step 1
  [[maybe_unused]] float weight[kHeadTiles][2] = {};
  [[maybe_unused]] bool exists[kHeadTiles][2] = {};
  [[maybe_unused]] float energy[kHeadTiles][2] = {};
  [[maybe_unused]] float partial_factor = 0;  // 0: the query has no partial block
  if (query < queries) {
    operands.load(problem.q, task.t, task.first_head);
    if constexpr (output == MeansOutput::head_energies) {
      copy_weights(shared.weights[warp], problem.w, heads, task);
      if (task.length % arguments.means.block != 0) {
        partial_factor = store_partial_mean<fp16, dim>(
            load_partial_mean<dim>(arguments.means, task.t), shared.partial[warp][0], dim);
      }
    } else {
#pragma unroll
      for (int i = 0; i < kHeadTiles * 2; ++i) {
        const int head = task.first_head + i * 8 + lane / 4;
        exists[i / 2][i % 2] = head < heads;
        weight[i / 2][i % 2] =
            head < heads ? problem.w.data[task.t * problem.w.token_stride + head] : 0;
      }
    }
  }

  for (int first = 0, end = 0; first < queries; first = end) {
    const QueryRun run(first, range, blocks);
    const std::int32_t max_blocks = run.max_blocks;
    const std::int32_t query_blocks = __shfl_sync(kFullMask, run.lane_blocks, query);
    end = run.end;
    const TileShare share(max_blocks, kRows);
    for (std::int32_t tile = share.first - kRows; tile < share.end; tile += kRows) {
      const std::int32_t next = tile + kRows;
      if (next < share.end) {
        load_means_tile<given>(shared.tiles[next / kRows % 2], arguments, run.sequence_start, next,
                               min(kRows, max_blocks - next));
      }
      commit_copies();
      if (tile < share.first) {
        continue;
      }
      wait_for_copies<1>();
      __syncthreads();
      const int buffer = tile / kRows % 2;
      const int count = min(kRows, query_blocks - tile);
      if constexpr (output == MeansOutput::head_energies) {
        add_energies(shared.tiles[buffer], operands, count, energy);
        __syncthreads();
      } else {
        write_warp_scores(shared.tiles[buffer], operands, weight, exists, count,
                          shared.scores[buffer][warp]);
        __syncthreads();
        // The query's warps divide its blocks among them; for each block, a lane adds up what all
        // of the query's warps wrote.
        for (int i = warp % query_warps * 32 + lane; i < count; i += query_warps * 32) {
          float score = shared.scores[buffer][query * query_warps][i];
          for (int other = 1; other < query_warps; ++other) {
            score += shared.scores[buffer][query * query_warps + other][i];
          }
          arguments.scores[task.t * arguments.stride + tile + i] = score;
        }
      }
    }
  }

  if constexpr (output == MeansOutput::head_energies) {  // step 5
    wait_for_copies<0>();
    __syncwarp();
    if (task.length > 0) {
      write_energies(shared.partial[warp], partial_factor, shared.weights[warp], operands, energy,
                     shared.energies[warp]);
    }
    __syncthreads();
    if (query >= queries || warp % query_warps != 0) {
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

template <DType type, bool fp16, int dim, MeansOutput output, bool given, class Source>
void launch(const MeansArguments<Source>& arguments, int num_sms, cudaStream_t stream) {
  constexpr int kBytes = sizeof(MeansShared<dim, kMeanParts<fp16>>);
  const auto kernel = mean_products_kernel<Source, type, fp16, dim, output, given>;
  const Queries& q = arguments.problem.q;
  const std::int64_t queries = kWarps / ((q.heads + kWarpHeads - 1) / kWarpHeads);
  const std::int64_t columns = (q.tokens + queries - 1) / queries;
  // Energies are sums over blocks, whose order must not depend on how they are divided.
  const bool divisible = output == MeansOutput::block_scores;
  const dim3 grid =
      shared_tiles_grid(columns, divisible ? arguments.stride : 0, kTileMeans<kMeanParts<fp16>>,
                        std::int64_t{num_sms} * kBlocksPerSmOf<type>);
  launch_kernel("block-mean products", kernel, grid, kThreads, kBytes, stream, arguments);
}

template <DType type, bool fp16, MeansOutput output, bool given, class Source>
void launch(const MeansArguments<Source>& arguments, int num_sms, cudaStream_t stream) {
  if (arguments.problem.q.dim == 64) {
    launch<type, fp16, 64, output, given>(arguments, num_sms, stream);
  } else {
    launch<type, fp16, 128, output, given>(arguments, num_sms, stream);
  }
}

template <MeansOutput output, bool given, class Source>
void launch(const MeansArguments<Source>& arguments, int num_sms, cudaStream_t stream) {
  switch (arguments.problem.q.dtype) {
    case DType::f32: return launch<DType::f32, false, output, given>(arguments, num_sms, stream);
    case DType::bf16: return launch<DType::bf16, false, output, given>(arguments, num_sms, stream);
    case DType::e4m3:
      if constexpr (!given) {
        if (arguments.means.fp16) {
          return launch<DType::e4m3, true, output, given>(arguments, num_sms, stream);
        }
      }
      if constexpr (!kPaged<Source>) {
        return launch<DType::e4m3, false, output, given>(arguments, num_sms, stream);
      }
  }
}

template <MeansOutput output, class Source>
void launch(const MeansArguments<Source>& arguments, int num_sms, cudaStream_t stream) {
  if constexpr (!kPaged<Source>) {
    if (arguments.means.starts == nullptr) {
      return launch<output, true>(arguments, num_sms, stream);
    }
  }
  launch<output, false>(arguments, num_sms, stream);
}

}  // namespace misa::cuda::block_mean_products
