// SPDX-License-Identifier: Apache-2.0
// Top-k of few long rows: a cluster of thread blocks shares a row (row.cuh), which is still read
// once.
//
//  1. As many thread blocks take part as the row has work for; the others end. A short row has one.
//  2. Each of them computes the threshold, all from the same sample.
//  3. Each streams its own part of the row. The first thread block, the leader, appends candidates
//     to its list directly; the others do so to a list of their own, reserve room in the leader's,
//     and copy theirs there.
//  4. The leader finds the k-th entry in its list and tells it to the others. If the sample was
//     misleading, the leader selects the row alone, and the others end.
//  5. Each counts the selected positions of its part and tells those that come after it.
//  6. Each writes the selected positions of its part.
#include <cooperative_groups.h>
#include <cuda_runtime.h>

#include <algorithm>
#include <cstddef>
#include <cstdint>

#include "cuda/launch.cuh"
#include "misa/cuda.hpp"
#include "select/generic.hpp"
#include "select/generic_config.cuh"
#include "select/row.cuh"

namespace misa::cuda::select {
namespace {

// One thread block selects a shorter row in less time, 11.5 us for 32K scores on an H200, as the
// exchange between thread blocks takes about 2 us.
constexpr std::uint32_t kLeastShared = 65536;

// What a thread block that takes part has to read at least, 32 KB.
constexpr std::uint32_t kLeastPart = 8192;

// Clusters of more than 8 need a permission (cudaFuncAttributeNonPortableClusterSizeAllowed) and a
// device that can place them, which is known of Hopper alone. With 16 a row of a million scores is
// read in half the time.
constexpr int kMaxCluster = 16;
constexpr int kMaxPortableCluster = 8;
static_assert(kLeastShared / kLeastPart > 1 && kLeastShared > kMaxTopK + kRowCandidates);

// How many scores the threshold should let through: more than k by five standard deviations of what
// the sample says. If `length` scores lie `weight` apart in the sample, `count` of them have a
// standard deviation of sqrt(count * weight). Where that is more than fits, midway.
//
// Devices before compute capability 9.0 have no clusters, and so no use for what is marked as
// unused.
[[maybe_unused]] __device__ inline std::uint32_t target_of(const RowPlan& plan,
                                                           std::uint32_t length, int sampled) {
  const float weight = static_cast<float>(length) / static_cast<float>(sampled);
  const auto k = static_cast<float>(plan.top_k);
  const float target = k + 5 * sqrtf(k * weight) + 12 * weight;
  const std::uint32_t middle = plan.top_k + (plan.capacity - plan.top_k) / 2;
  return min(static_cast<std::uint32_t>(target), middle);
}

// The threshold of a row, the same in each thread block.
template <int vectors>
__device__ float row_threshold(Shared& shared, RowPlan plan, const Row& row) {
  plan.target = target_of(plan, row.length, kSampled<vectors>);
  return sample_threshold<vectors>(shared, plan, row);
}

// How many positions of each part are selected.
struct PartCounts {
  std::uint32_t of[kMaxCluster];
};

// Step 3 of a thread block that is not the leader, once its candidates are complete.
[[maybe_unused]] __device__ inline void send(Shared& own, const RowCandidate* candidates,
                                             Shared& leader, RowCandidate* target,
                                             std::uint32_t capacity) {
  const std::uint32_t count = own.appended;
  if (threadIdx.x == 0) {
    own.ranked_count = atomicAdd(&leader.appended, count);
  }
  __syncthreads();
  const std::uint32_t base = own.ranked_count;
  if (base + std::uint64_t{count} <= capacity) {  // else the leader ignores all candidates
    for (std::uint32_t i = threadIdx.x; i < count; i += kThreads) {
      target[base + i] = candidates[i];
    }
  }
}

__global__ void __launch_bounds__(kThreads, 1)
    cluster_kernel(const Logits logits, const RowPlan plan, const TopK out, const bool empty) {
  begin_kernel();
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  extern __shared__ __align__(16) std::byte bytes[];
  const auto cluster = cooperative_groups::this_cluster();
  const std::uint32_t rank = cluster.block_rank();
  const std::int64_t row_index = blockIdx.x / cluster.num_blocks();
  const std::uint32_t length = row_length(logits, row_index);
  const float* const scores = logits.data + row_index * logits.row_stride;
  const OutputRow target = output_row(out, row_index, plan.top_k);

  const std::uint32_t parts = min(length / kLeastPart, cluster.num_blocks());  // step 1
  if (length < kLeastShared) {
    if (rank == 0 && (length > 0 || empty)) {
      select_row(bytes, plan, scores, length, target);
    }
    return;
  }
  if (rank >= parts) {
    return;
  }
  __shared__ PartCounts selected;
  const RowMemory memory(bytes, plan);
  Shared& shared = memory.shared;
  if (threadIdx.x == 0) {
    shared.appended = 0;
  }
  cluster.barrier_arrive();  // the leader's list is empty
  const Row row(scores, length);
  const auto part_begin = [&](std::uint32_t part) {  // in vectors
    return static_cast<std::uint32_t>(std::uint64_t{row.vectors} * part / parts);
  };
  const std::uint32_t first = part_begin(rank);
  const std::uint32_t end = part_begin(rank + 1);
  const bool leads = rank == 0;
  const bool is_last = rank == parts - 1;
  Vectors next;
  next.load(row, first, end);
  const float threshold = length < kLeastManySamples  // step 2; has barriers
                              ? row_threshold<kSampleVectors>(shared, plan, row)
                              : row_threshold<kManySampleVectors>(shared, plan, row);
  stream(shared, memory.candidates, plan.capacity, threshold, row, first, end, next);
  append_edges(shared, memory.candidates, plan.capacity, threshold, row, leads, is_last);
  cluster.barrier_wait();
  __syncthreads();
  const std::uint32_t own = shared.appended;  // of the leader: not only its own
  if (!leads) {
    send(shared, memory.candidates, *cluster.map_shared_rank(&shared, 0),
         cluster.map_shared_rank(memory.candidates, 0), plan.capacity);
  }
  cluster.sync();  // the leader's list is complete

  if (leads) {  // step 4
    const std::uint32_t count = shared.appended;
    std::uint64_t kth_entry = 0;
    if (count >= plan.top_k && count <= plan.capacity) {
      const RowEntries all{memory.candidates, count, row.scores, 0, 0};
      kth_entry = find_kth_entry(shared, count, plan.top_k, length,
                                 [&](const auto& visitor) { all.visit(0, 0, visitor); });
    }
    __syncthreads();
    if (threadIdx.x < parts) {
      cluster.map_shared_rank(&shared, threadIdx.x)->kth_entry = kth_entry;
    }
  }
  cluster.sync();
  const std::uint64_t kth_entry = shared.kth_entry;
  if (kth_entry == 0) {
    if (leads) {
      select_candidates(memory, plan, row, shared.appended, threshold, target);
    }
    return;
  }

  const std::uint32_t begin_position = leads ? 0 : row.head + 4 * first;
  const std::uint32_t end_position = is_last ? length : row.head + 4 * end;
  const RowEntries source{memory.candidates, leads ? shared.appended : own, row.scores, 0, 0};
  std::uint32_t mine = 0;  // step 5
  source.visit(0, 0, [&](std::uint64_t entry, bool valid) {
    mine += valid && entry >= kth_entry && entry_position(entry) < end_position ? 1 : 0;
  });
  mine = __reduce_add_sync(kFullMask, mine);
  if (threadIdx.x % 32 == 0) {
    shared.radix.counts[threadIdx.x / 32] = mine;
  }
  __syncthreads();
  if (threadIdx.x < parts) {
    std::uint32_t sum = 0;
    for (const std::uint32_t count : shared.radix.counts) {
      sum += count;
    }
    cluster.map_shared_rank(&selected, threadIdx.x)->of[rank] = sum;
  }
  cluster.sync();
  std::uint32_t written = 0;  // step 6
  for (std::uint32_t part = 0; part < rank; ++part) {
    written += selected.of[part];
  }
  emit_range(shared, memory.staged, source, kth_entry, begin_position, end_position, written,
             plan.top_k, target);
#endif
}

}  // namespace

int cluster_size(const Logits& logits, int num_sms) {
  const int major = device_attribute(cudaDevAttrComputeCapabilityMajor);
  if (major < 9) {
    return 1;
  }
  const int most = major == 9 ? kMaxCluster : kMaxPortableCluster;
  // Two thread blocks on an SM take longer than one with twice the work, and where more than half
  // of the SMs are wanted, clusters of 4 and more do not find a free place each.
  const auto fits = [&](int size) {
    return logits.rows * size <= (size > 2 ? num_sms / 2 : num_sms);
  };
  int size = 1;
  while (logits.columns >= kLeastShared && size < most && fits(2 * size)) {
    size *= 2;
  }
  return size;
}

void launch_cluster(const Logits& logits, int top_k, int size, const TopK& out, bool empty,
                    void* stream) {
  // One thread block an SM may have all shared memory.
  RowPlan plan = plan_row(top_k, shared_limit() - sizeof(PartCounts));
  plan.capacity = static_cast<std::uint32_t>(
      (shared_limit() - sizeof(PartCounts) - RowPlan{plan.top_k, 0, 0}.bytes()) /
      sizeof(RowCandidate));
  check(cudaFuncSetAttribute(cluster_kernel, cudaFuncAttributeNonPortableClusterSizeAllowed, 1),
        "selection by clusters");
  launch_clusters("selection by clusters", cluster_kernel,
                  dim3(static_cast<unsigned>(logits.rows * size)), size, kThreads, plan.bytes(),
                  stream, logits, plan, out, empty);
}

}  // namespace misa::cuda::select
