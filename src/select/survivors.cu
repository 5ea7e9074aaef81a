// Exact top-k of the candidates that passed a row's bound: one thread block a row.
//
//  1. A row of no more than k keys selects all of them; without scores that needs no candidates.
//  2. A warp's lists are gathered into shared memory. A row that lost candidates, or has too few,
//     is a miss.
//  3. The cut is the entry (entry.hpp) of rank k (radix.cuh).
//  4. All entries from the cut on are written (emit.cuh).
//
// Candidates beyond what shared memory holds are read from their lists again: slower, never wrong.
// Their order in shared memory is any; the cut and the output depend on the set alone.
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/range.cuh"
#include "select/emit.cuh"
#include "select/entry.hpp"
#include "select/fused.hpp"
#include "select/generic_config.cuh"
#include "select/launch.cuh"
#include "select/radix.cuh"

namespace misa::cuda::select {
namespace {

// Loads in flight a lane: with 2048 threads 64 KB an SM (see kLoads).
constexpr int kListLoads = 4;

// The lists of a row, and the copy of their candidates where it is whole.
struct Lists {
  const Held* entries;
  const std::uint32_t* counts;
  std::uint32_t lists;
  std::uint32_t capacity;
  const Held* held;
  std::uint32_t count;
  bool whole;

  template <class Visitor>
  __device__ void visit(std::uint32_t, std::uint32_t, const Visitor& visitor) const {
    if (whole) {
      for (std::uint32_t base = 0; base < count; base += kThreads) {
        const std::uint32_t i = base + threadIdx.x;
        const Held candidate = i < count ? held[i] : Held{};
        visitor(make_entry(candidate.score, candidate.position), i < count);
      }
      return;
    }
    for (std::uint32_t list = threadIdx.x / 32; list < lists; list += kWarps) {
      const std::uint32_t filled = min(counts[list], capacity);
      for (std::uint32_t base = 0; base < filled; base += 32) {
        const std::uint32_t i = base + threadIdx.x % 32;
        const Held candidate = i < filled ? entries[list * capacity + i] : Held{};
        visitor(make_entry(candidate.score, candidate.position), i < filled);
      }
    }
  }
};

// Step 2. Lane l of a warp looks after its l-th list; all lanes copy each.
__device__ void gather(Shared& shared, const Lists& row, Held* held, std::uint32_t capacity) {
  const std::uint32_t lane = threadIdx.x % 32;
  for (std::uint32_t first = threadIdx.x / 32; first < row.lists; first += kThreads) {
    const std::uint32_t list = first + lane * kWarps;
    std::uint32_t filled = list < row.lists ? row.counts[list] : 0;
    if (filled > row.capacity) {
      atomicOr(&shared.overflow, 1U);
      filled = row.capacity;
    }
    std::uint32_t end = filled;
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
      const std::uint32_t before = __shfl_up_sync(kWarp, end, step);
      end += lane >= step ? before : 0;
    }
    std::uint32_t base = 0;
    if (lane == 31) {
      base = atomicAdd(&shared.appended, end);
    }
    const std::uint32_t start = __shfl_sync(kWarp, base, 31) + end - filled;

    const std::uint32_t own = min((row.lists - first + kWarps - 1) / kWarps, 32U);
    for (std::uint32_t next = 0; next < own; next += kListLoads) {
      std::uint32_t counts[kListLoads];
      std::uint32_t starts[kListLoads];
      std::uint32_t longest = 0;
#pragma unroll
      for (std::uint32_t j = 0; j < kListLoads; ++j) {
        // Lanes without a list have none filled; beyond the last lane there are none.
        const std::uint32_t from = min(next + j, 31U);
        counts[j] = next + j < own ? __shfl_sync(kWarp, filled, from) : 0;
        starts[j] = __shfl_sync(kWarp, start, from);
        longest = max(longest, counts[j]);
      }
      for (std::uint32_t i = lane; i < longest; i += 32) {
        Held copies[kListLoads];
#pragma unroll
        for (std::uint32_t j = 0; j < kListLoads; ++j) {
          if (i < counts[j]) {
            copies[j] = row.entries[(first + (next + j) * kWarps) * row.capacity + i];
          }
        }
#pragma unroll
        for (std::uint32_t j = 0; j < kListLoads; ++j) {
          if (i < counts[j] && starts[j] + i < capacity) {
            held[starts[j] + i] = copies[j];
          }
        }
      }
    }
  }
}

__global__ void __maxnreg__(kSurvivorRegisters)
    survivors_kernel(const Candidates candidates, const Keys keys, const Plan plan, const TopK out,
                     const Misses misses) {
  extern __shared__ __align__(16) std::byte memory[];
  Shared& shared = *reinterpret_cast<Shared*>(memory);
  auto* held = reinterpret_cast<Held*>(memory + sizeof(Shared));
  auto* staged = reinterpret_cast<std::uint16_t*>(held + plan.capacity);
  const std::int64_t t = blockIdx.x;
  const auto length = static_cast<std::uint32_t>(visible(keys, t).length);
  const OutputRow output = output_row(out, t, plan.top_k);

  if (length == 0 || (length <= plan.top_k && output.scores == nullptr)) {  // step 1
    for (std::uint32_t i = threadIdx.x; i < length; i += kThreads) {
      output.indices[i] = static_cast<std::int32_t>(i);
    }
    pad(output, length, plan.top_k);
    return;
  }

  if (threadIdx.x == 0) {
    shared.appended = 0;
    shared.overflow = 0;
  }
  __syncthreads();
  const std::int64_t list = t * candidates.lists;
  Lists row{reinterpret_cast<const Held*>(candidates.entries) + list * candidates.capacity,
            candidates.counts + list,
            candidates.lists,
            candidates.capacity,
            held,
            0,
            false};
  gather(shared, row, held, plan.capacity);
  __syncthreads();
  row.count = shared.appended;
  row.whole = row.count <= plan.capacity;
  const std::uint32_t wanted = min(plan.top_k, length);
  if (shared.overflow != 0 || row.count < wanted) {
    if (threadIdx.x == 0) {
      misses.rows[atomicAdd(misses.count, 1U)] = static_cast<std::int32_t>(t);
    }
    return;
  }
  const std::uint64_t cut = select_entry(
      shared, row.count, wanted, [&](const auto& visitor) { row.visit(0, length, visitor); });
  emit(shared, staged, row, cut, length, plan.top_k, output);
}

}  // namespace

void launch_survivors(const Candidates& candidates, const Keys& keys, std::int64_t rows, int top_k,
                      const TopK& out, const Misses& misses, void* stream) {
  const Plan plan = plan_survivors(top_k, shared_limit());
  launch(survivors_kernel, rows, plan.bytes(), stream, candidates, keys, plan, out, misses);
}

}  // namespace misa::cuda::select
