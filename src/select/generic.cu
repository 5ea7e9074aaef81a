// SPDX-License-Identifier: Apache-2.0
// Top-k of rows of scores, one thread block per row (row.cuh; short rows: short.cu; few long rows:
// cluster.cu).
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/launch.cuh"
#include "misa/cuda.hpp"
#include "select/generic.hpp"
#include "select/generic_config.cuh"
#include "select/row.cuh"

namespace misa::cuda::select {
namespace {

__global__ void __launch_bounds__(kThreads, kRowBlocksPerSm)
    top_k_kernel(const Logits logits, const RowPlan plan, const TopK out, const bool empty) {
  begin_kernel();
  extern __shared__ __align__(16) std::byte memory[];
  const std::int64_t row = blockIdx.x;
  const std::uint32_t length = row_length(logits, row);
  if (length > 0 || empty) {
    select_row(memory, plan, logits.data + row * logits.row_stride, length,
               output_row(out, row, plan.top_k));
  }
}

}  // namespace

void launch_generic(const Logits& logits, int top_k, const TopK& out, bool empty, int num_sms,
                    void* stream) {
  if (logits.columns <= kShortColumns) {
    launch_short(logits, DeviceRaggedSource{}, Columns{nullptr, 0, 1}, top_k, out, empty, stream);
    return;
  }
  const int cluster = cluster_size(logits, num_sms);
  if (cluster > 1) {
    launch_cluster(logits, top_k, cluster, out, empty, stream);
    return;
  }
  const RowPlan plan = plan_row(top_k, shared_limit());
  launch_kernel("selection", top_k_kernel, dim3(static_cast<unsigned>(logits.rows)), kThreads,
                plan.bytes(), stream, logits, plan, out, empty);
}

}  // namespace misa::cuda::select
