// SPDX-License-Identifier: Apache-2.0
// The block filter (HISA): which blocks of its keys a query keeps. A warp serves a query.
//
//  1. Up to `filter_blocks` blocks are all kept.
//  2. Else the first and the last are, and the others compete. The key (a score's ordered image) of
//     the last that wins is found bit by bit: the largest that enough keys reach.
//  3. Blocks above that key are kept, of those equal to it the lowest; ranks of the kept ones among
//     themselves are their places.
#include <cuda_runtime.h>

#include "core/entry.hpp"
#include "cuda/launch.cuh"
#include "cuda/range.cuh"
#include "cuda/warp.cuh"
#include "filter/block_scores.hpp"
#include "filter/generic.hpp"

namespace misa::cuda::filter {
namespace {

constexpr int kWarps = 4;
constexpr int kThreads = kWarps * 32;
constexpr std::size_t kAlignment = 64;

// Keys of scores that a lane holds: 1024 blocks a warp. Those of further blocks are read each time.
constexpr int kHeld = 32;

struct Arguments {
  Keys keys;
  std::int64_t tokens;
  const float* scores;  // [T, stride]
  std::int64_t stride;
  std::int32_t block;
  std::int32_t kept;     // blocks wanted
  std::int32_t* blocks;  // [T, kept]
};

// The key of block b; 0 where it does not compete, for no key that is asked for is that small.
__device__ std::uint32_t key_of(const float* scores, std::int32_t b, std::int32_t last) {
  return b > 0 && b < last ? ordered_bits(scores[b]) : 0;
}

// How many of the keys of blocks 1 … last - 1 reach `key`.
__device__ std::int32_t reaching(const std::uint32_t (&held)[kHeld], const float* scores,
                                 std::int32_t last, std::uint32_t key) {
  std::int32_t count = 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (i * 32 >= last) {
      break;
    }
    count += held[i] >= key ? 1 : 0;
  }
  for (std::int32_t b = kHeld * 32 + static_cast<std::int32_t>(threadIdx.x % 32); b < last;
       b += 32) {
    count += key_of(scores, b, last) >= key ? 1 : 0;
  }
  return __reduce_add_sync(kFullMask, count);
}

__global__ void __launch_bounds__(kThreads) filter_kernel(const Arguments arguments) {
  begin_kernel();
  const std::int64_t t = std::int64_t{blockIdx.x} * kWarps + threadIdx.x / 32;
  if (t >= arguments.tokens) {
    return;
  }
  const auto lane = static_cast<std::int32_t>(threadIdx.x % 32);
  const std::int32_t n = visible(arguments.keys, t).length;
  const std::int32_t blocks = n / arguments.block + (n % arguments.block != 0 ? 1 : 0);
  const float* scores = arguments.scores + t * arguments.stride;
  std::int32_t* out = arguments.blocks + t * arguments.kept;
  if (blocks <= arguments.kept) {  // step 1
    for (std::int32_t i = lane; i < arguments.kept; i += 32) {
      out[i] = i < blocks ? i : -1;
    }
    return;
  }

  const std::int32_t last = blocks - 1;
  const std::int32_t wanted = arguments.kept - 2;
  std::uint32_t held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    held[i] = key_of(scores, i * 32 + lane, last);
  }
  std::uint32_t key = 0;
#pragma unroll 1
  for (int bit = 31; bit >= 0; --bit) {  // step 2
    const std::uint32_t candidate = key | 1U << bit;
    const std::int32_t count = reaching(held, scores, last, candidate);
    key = count >= wanted ? candidate : key;
    if (count == wanted) {
      break;
    }
  }
  std::int32_t equals = wanted - reaching(held, scores, last, key + 1);

  const auto keep_winners = [&](std::int32_t b, std::uint32_t own) {  // step 3
    const bool competes = b > 0 && b < last;
    const std::uint32_t before = (1U << lane) - 1;
    const std::uint32_t equal = __ballot_sync(kFullMask, competes && own == key);
    const bool wins = b == 0 || b == last || (competes && own > key) ||
                      (competes && own == key && __popc(equal & before) < equals);
    const std::uint32_t winners = __ballot_sync(kFullMask, wins);
    if (wins) {
      out[__popc(winners & before)] = b;
    }
    out += __popc(winners);
    equals -= min(equals, __popc(equal));
  };
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (i * 32 >= blocks) {
      break;
    }
    keep_winners(i * 32 + lane, held[i]);
  }
  for (std::int32_t first = kHeld * 32; first < blocks; first += 32) {
    keep_winners(first + lane, key_of(scores, first + lane, last));
  }
}

// Blocks of the longest row.
std::int64_t score_stride(std::int64_t max_keys, std::int32_t block) {
  return (max_keys + block - 1) / block;
}

std::size_t score_bytes(std::int64_t tokens, std::int64_t stride) {
  const std::size_t bytes =
      static_cast<std::size_t>(tokens) * static_cast<std::size_t>(stride) * sizeof(float);
  return (bytes + kAlignment - 1) / kAlignment * kAlignment;
}

}  // namespace

std::size_t workspace_bytes(const IndexerConfig& config, const Shape& shape) {
  return score_bytes(shape.tokens, score_stride(shape.max_keys, config.filter_block));
}

void launch(const Problem& problem, const IndexerConfig& config, const DeviceTraits& device,
            const BlockMeans& means, std::int32_t* blocks, std::span<std::byte> workspace,
            cudaStream_t stream) {
  if (problem.q.tokens == 0) {
    return;
  }
  const std::int64_t stride = score_stride(problem.k.max_keys, config.filter_block);
  auto* scores = reinterpret_cast<float*>(workspace.data());
  launch_block_scores(problem, device, means, scores, stride, stream);
  const auto grid = static_cast<unsigned>((problem.q.tokens + kWarps - 1) / kWarps);
  launch_kernel("block filter", filter_kernel, dim3(grid), kThreads, 0, stream,
                Arguments{problem.k, problem.q.tokens, scores, stride, config.filter_block,
                          config.filter_blocks, blocks});
}

}  // namespace misa::cuda::filter
