// Scores of block means on Hopper, for the block filter: e4m3 queries and keys, D = 128, at most 64
// heads. A warpgroup serves a query, a block of threads four.
//
//  1. The query's heads are operands in registers, in fp16.
//  2. Queries of one sequence share the means of whole blocks, which pass by in tiles: the next one
//     is copied while this one is multiplied. A row of the pool's table that holds another
//     sequence's block is computed here.
//  3. x = q . mean for all heads and a tile's blocks, the low parts of the means first.
//  4. A thread clips and weighs the two heads that it holds of every fourth pair of blocks, then
//  has
//     a block of its own and adds up what the 32 threads found that hold its heads, in order.
//
// So the order of every sum follows from the query's own heads.
#include <cuda_runtime.h>

#include <cuda/ptx>

#include "cuda/launch.cuh"
#include "cuda/range.cuh"
#include "device/wgmma.cuh"
#include "pool/means.cuh"
#include "route/heads.cuh"
#include "route/sm90_scores.hpp"

namespace misa::cuda::route {
namespace {

namespace ptx = ::cuda::ptx;

constexpr int kDim = 128;
constexpr int kMaxRows = 64;  // rows of a product

constexpr int kGroupWarps = 4;
constexpr int kGroupThreads = kGroupWarps * 32;
constexpr int kGroups = 4;  // an SM's registers: 32 of operands and 64 of sums a thread
constexpr int kGroupsWarps = kGroups * kGroupWarps;
constexpr int kGroupsThreads = kGroups * kGroupThreads;

// Blocks of a tile: columns of a product, one a thread of a group.
constexpr int kBlocks = kGroupThreads;

// A tile is cut along D into rows of 128 bytes, as products read it.
constexpr int kHalves = 2;
constexpr int kRowBytes = kDim / kHalves * 2;
constexpr int kRowChunks = kRowBytes / 16;

// Threads that share a column, and floats from one's sums to the next's: in other banks.
constexpr int kShares = kMaxRows / 2;
constexpr int kSumPitch = kBlocks + 8;

struct Shared {
  alignas(1024) std::uint8_t rows[2][pool::kFp16Parts][kHalves][kBlocks][kRowBytes];
  alignas(16) std::uint16_t computed[kGroupsWarps][pool::kFp16Parts][kDim];
  alignas(16) float sums[kGroups][kShares][kSumPitch];
  float factors[2][kBlocks];
};

static_assert(sizeof(Shared) + 1024 <= 227 * 1024);

struct Arguments {
  Problem problem;
  pool::Means means;
  float* scores;  // [T, stride]
  std::int64_t stride;
};

#define MISA_D8(i)                                                                    \
  "+f"(d[i]), "+f"(d[(i) + 1]), "+f"(d[(i) + 2]), "+f"(d[(i) + 3]), "+f"(d[(i) + 4]), \
      "+f"(d[(i) + 5]), "+f"(d[(i) + 6]), "+f"(d[(i) + 7])

// D[64, 128] (+)= A[64, 16] B[128, 16]^T in fp16 with fp32 sums, A in registers as mma_fp16 has it:
// 16 rows a warp.
__device__ inline void wgmma_fp16(float (&d)[kBlocks / 2], const std::uint32_t (&a)[4],
                                  std::uint64_t b, bool add) {
  asm volatile(
      "{\n.reg .pred add;\nsetp.ne.b32 add, %69, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n128k16.f32.f16.f16 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, "
      "%16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31, "
      "%32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, "
      "%48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
      "}, {%64, %65, %66, %67}, %68, add, 1, 1, 0;\n}\n"
      : MISA_D8(0), MISA_D8(8), MISA_D8(16), MISA_D8(24), MISA_D8(32), MISA_D8(40), MISA_D8(48),
        MISA_D8(56)
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(static_cast<int>(add)));
}

#undef MISA_D8

// Step 2. Blocks first … first + count - 1 of the sequence that starts at `start`, a warp a row and
// a lane 16 bytes of it.
__device__ void load_tile(Shared& shared, int buffer, const Arguments& arguments,
                          std::int32_t start, std::int32_t first, int count) {
  constexpr int kRows = kBlocks / kGroupsWarps;  // of a warp
  const pool::Means& means = arguments.means;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const int part = lane / (kHalves * kRowChunks);
  const int half = lane / kRowChunks % kHalves;
  const int chunk = lane % kRowChunks;
  const std::int64_t row0 = std::int64_t{start} / means.block + first;

  // Lane l asks for the warp's row l.
  const int asked = warp + lane * kGroupsWarps;
  const std::int64_t asked_row = row0 + asked;
  const bool wanted = lane < kRows && asked < count;
  const bool listed = wanted && asked_row < means.capacity && means.starts[asked_row] == start;
  if (listed) {
    shared.factors[buffer][asked] = means.factors[asked_row];
  }
  const std::uint32_t copied = __ballot_sync(kWarp, listed);
  const std::uint32_t there = __ballot_sync(kWarp, wanted);
#pragma unroll 1
  for (int i = 0; i < kRows && (there >> i & 1) != 0; ++i) {
    const int row = warp + i * kGroupsWarps;
    std::uint8_t* const place =
        shared.rows[buffer][part][half][row] + (chunk ^ row % kRowChunks) * 16;
    if ((copied >> i & 1) != 0) {
      copy_16(place, means.blocks + ((row0 + row) * 32 + lane) * 8);
      continue;
    }
    const float factor = pool::write_mean<true>(arguments.problem.k, means,
                                                start + std::int64_t{first + row} * means.block,
                                                shared.computed[warp][0], kDim);
    __syncwarp();
    *reinterpret_cast<uint4*>(place) =
        *reinterpret_cast<const uint4*>(&shared.computed[warp][0][lane * 8]);
    if (lane == 0) {
      shared.factors[buffer][row] = factor;
    }
    __syncwarp();
  }
}

// Step 3.
__device__ void multiply(const Shared& shared, int buffer,
                         const HeadRows<DType::e4m3, true, kDim, 1>& heads,
                         float (&x)[kBlocks / 2]) {
  constexpr int kSteps = kDim / kStep;
  wgmma_fence();
#pragma unroll
  for (int part = pool::kFp16Parts - 1; part >= 0; --part) {
#pragma unroll
    for (int s = 0; s < kSteps; ++s) {
      const std::uint64_t rows = swizzled_tile(shared.rows[buffer][part][s / (kSteps / kHalves)]) +
                                 2 * (s % (kSteps / kHalves));
      wgmma_fp16(x, heads.a[0][0][s], rows, part < pool::kFp16Parts - 1 || s > 0);
    }
  }
  wgmma_commit();
  wgmma_wait<0>();
  wgmma_pin(x);
}

__global__ void __launch_bounds__(kGroupsThreads, 1)
    block_scores_kernel(const __grid_constant__ Arguments arguments) {
  begin_kernel();
  extern __shared__ __align__(1024) std::byte memory[];
  auto& shared = *reinterpret_cast<Shared*>(memory);
  const Problem& problem = arguments.problem;
  const std::int64_t t0 = std::int64_t{blockIdx.x} * kGroups;
  const int queries = static_cast<int>(min(std::int64_t{kGroups}, problem.q.tokens - t0));
  // The same for a whole warp, and the compiler is to know it.
  const int group = __shfl_sync(kWarp, static_cast<int>(threadIdx.x) / kGroupThreads, 0);
  const int thread = static_cast<int>(threadIdx.x) % kGroupThreads;
  const int warp = thread / 32;
  const int lane = thread % 32;
  const std::int64_t t = t0 + group;

  HeadRows<DType::e4m3, true, kDim, 1> heads;  // step 1
  float weight[2] = {};
  bool exists[2] = {};
  std::int32_t own_whole = 0;
  if (group < queries) {
    heads.load(problem.q, t, warp * kTileHeads);
    own_whole = visible(problem.k, t).length / arguments.means.block;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int head = warp * kTileHeads + half * 8 + lane / 4;
      exists[half] = head < problem.q.heads;
      weight[half] = exists[half] ? problem.w.data[t * problem.w.token_stride + head] : 0;
    }
  }

  for (int first = 0, end = 0; first < queries; first = end) {
    const Range range = visible(problem.k, t0 + first);
    std::int32_t whole = range.length / arguments.means.block;  // of the longest query
    for (end = first + 1; end < queries; ++end) {
      const Range next = visible(problem.k, t0 + end);
      if (next.start != range.start) {
        break;
      }
      whole = max(whole, next.length / arguments.means.block);
    }
    for (std::int32_t tile = -kBlocks; tile < whole; tile += kBlocks) {
      const std::int32_t next = tile + kBlocks;
      if (next < whole) {
        load_tile(shared, next / kBlocks % 2, arguments, range.start, next,
                  min(kBlocks, whole - next));
      }
      commit_copies();
      if (tile < 0) {
        continue;
      }
      wait_for_copies<1>();
      ptx::fence_proxy_async(ptx::space_shared);
      __syncthreads();
      const int buffer = tile / kBlocks % 2;
      const int count = first <= group && group < end ? min(kBlocks, own_whole - tile) : 0;
      if (count > 0) {
        float x[kBlocks / 2];
        multiply(shared, buffer, heads, x);
        float* const sums = shared.sums[group][warp * 8 + lane / 4] + lane % 4 * 2;
#pragma unroll
        for (int j = 0; j < kBlocks / 8; ++j) {  // step 4
          float sum[2] = {};
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
              const float clipped = max_nan(x[4 * j + 2 * half + e], 0);
              sum[e] = exists[half] ? __fmaf_rn(weight[half], clipped, sum[e]) : sum[e];
            }
          }
          *reinterpret_cast<float2*>(sums + 8 * j) = make_float2(sum[0], sum[1]);
        }
      }
      __syncthreads();
      if (count > 0) {
        float score = 0;
#pragma unroll
        for (int i = 0; i < kShares; ++i) {
          score += shared.sums[group][i][thread];
        }
        if (thread < count) {
          arguments.scores[t * arguments.stride + tile + thread] =
              score * shared.factors[buffer][thread];
        }
      }
      __syncthreads();
    }
  }
}

}  // namespace

bool takes_sm90(const Problem& problem) {
  return device_attribute(cudaDevAttrComputeCapabilityMajor) == 9 &&
         problem.q.dtype == DType::e4m3 && problem.k.dtype == DType::e4m3 &&
         problem.q.dim == kDim && problem.q.heads <= kMaxRows;
}

void launch_block_scores_sm90(const Problem& problem, const pool::Means& means, float* scores,
                              std::int64_t stride, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((problem.q.tokens + kGroups - 1) / kGroups);
  launch_kernel("block scores", block_scores_kernel, dim3(blocks), kGroupsThreads, sizeof(Shared),
                stream, Arguments{problem, means, scores, stride});
}

}  // namespace misa::cuda::route
