// Top-k of rows of scores: one thread block a row (row.cuh).
#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>

#include "cuda/check.cuh"
#include "misa/cuda.hpp"
#include "select/generic.hpp"
#include "select/generic_config.cuh"
#include "select/launch.cuh"
#include "select/row.cuh"

namespace misa::cuda::select {
namespace {

__global__ void __launch_bounds__(kThreads, kRowBlocksPerSm)
    top_k_kernel(const Logits logits, const RowPlan plan, const TopK out) {
  extern __shared__ __align__(16) std::byte memory[];
  const std::int64_t row = blockIdx.x;
  std::int64_t length = logits.columns;
  if (logits.lengths != nullptr) {
    length = max(std::int64_t{0}, min(length, std::int64_t{logits.lengths[row]}));
  }
  select_row(memory, plan, logits.data + row * logits.row_stride,
             static_cast<std::uint32_t>(length), output_row(out, row, plan.top_k));
}

}  // namespace

void launch_generic(const Logits& logits, int top_k, const TopK& out, void* stream) {
  const RowPlan plan = plan_row(top_k, shared_limit());
  launch(top_k_kernel, logits.rows, kThreads, plan.bytes(), stream, logits, plan, out);
}

}  // namespace misa::cuda::select
