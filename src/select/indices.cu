// SPDX-License-Identifier: Apache-2.0
#include "select/indices.hpp"

#include <cuda_runtime.h>

#include "cuda/key_source.cuh"
#include "cuda/launch.cuh"

namespace misa::cuda::select {
namespace {

constexpr int kThreads = 256;

// One thread per entry. Without offsets, which only paged keys may be, indices become slots.
template <class Source>
__global__ void indices_kernel(Source keys, std::int64_t entries, std::int32_t top_k,
                               std::int32_t* indices, std::int64_t stride,
                               const std::int32_t* offsets) {
  begin_kernel();
  const std::int64_t i = std::int64_t{blockIdx.x} * kThreads + threadIdx.x;
  if (i >= entries) {
    return;
  }
  const std::int64_t t = i / top_k;
  std::int32_t& index = indices[t * stride + i % top_k];
  if (index < 0) {
    return;
  }
  if (offsets != nullptr) {
    index = static_cast<std::int32_t>(static_cast<std::uint32_t>(index) +
                                      static_cast<std::uint32_t>(offsets[t]));
  } else if constexpr (kPaged<Source>) {
    const std::int32_t position = index;
    index = -1;
    if (position < row_limit(keys)) {  // as it is, unless outputs overlap
      const std::int64_t token =
          (std::int64_t{sequence_of(keys, t)} << keys.sequence_bits) + position;
      const std::int64_t page = page_of(keys, token);
      index = page < 0 ? -1
                       : static_cast<std::int32_t>((page << keys.page_bits) + slot_of(keys, token));
    }
  }
}

}  // namespace

template <class Source>
void launch_indices(const Source& keys, std::int64_t queries, int top_k, const Selection& out,
                    void* stream) {
  const std::int64_t entries = queries * top_k;
  launch_kernel("indices", indices_kernel<Source>,
                dim3(static_cast<unsigned>((entries + kThreads - 1) / kThreads)), kThreads, 0,
                stream, keys, entries, top_k, out.indices.data(), out.index_stride,
                out.slots ? nullptr : out.offsets.data());
}

template void launch_indices(const DeviceRaggedSource&, std::int64_t, int, const Selection&, void*);
template void launch_indices(const DevicePagedSource&, std::int64_t, int, const Selection&, void*);

}  // namespace misa::cuda::select
