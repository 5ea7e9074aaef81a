// Sizes of the pool's kernels.
#pragma once

#include <cub/block/block_scan.cuh>

#include <cstdint>

namespace misa::cuda::pool {

// One block finds the runs: as wide as a block can be, for 2048 queries take it two steps.
inline constexpr int kRunThreads = 1024;
using Scan = cub::BlockScan<std::int64_t, kRunThreads, cub::BLOCK_SCAN_WARP_SCANS>;

// A warp sums a page. 1024 pages (64K keys) are two blocks of 4 warps an SM.
inline constexpr int kWarps = 4;
inline constexpr int kThreads = kWarps * 32;

// Keys in flight a warp: 8 warps x 16 x 128 bytes are 16 KB an SM, half of what latency (0.8 µs) x
// bandwidth (32 bytes a ns and SM on an H200) asks for, in no more than 80 registers for fp32.
inline constexpr int kBatch = 16;

}  // namespace misa::cuda::pool
