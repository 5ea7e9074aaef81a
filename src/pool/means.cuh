// Page sums and block means in device memory: what the pool writes and routing reads.
//
// A run is a stretch of consecutive queries whose keys start at the same place; its queries share
// everything that whole pages and whole blocks hold. Every sum has one order, whoever computes it:
// scale * element is rounded once and added, tokens in order inside a page, then pages in order.
#pragma once

#include <cstdint>

#include "cuda/problem.hpp"
#include "device/elements.cuh"
#include "misa/types.hpp"
#include "pool/generic.hpp"
#include "pool/generic_config.cuh"

namespace misa::cuda::pool {

// Four elements of each of D / 4 lanes make a row.
inline constexpr int kLaneElements = 4;

// A run whose pages lie beyond the tables is summed from its keys by whoever needs it.
__device__ inline bool in_tables(const Means& means, const Run& run) {
  return run.page_row + std::int64_t{run.pages} <= means.capacity;
}

// sum = elements d … d + 3 of `count` keys from `token` on.
template <DType type>
__device__ void sum_keys(const Keys& keys, bool aligned, std::int64_t token, int count, int d,
                         float (&sum)[kLaneElements]) {
  for (float& element : sum) {
    element = 0;
  }
  for (int first = 0; first < count; first += kBatch) {
    Elements<type, kLaneElements> elements[kBatch];
    float scale[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const std::int64_t at = token + min(first + i, count - 1);
      const auto* row = static_cast<const std::byte*>(keys.data) +
                        at * keys.stride * static_cast<std::int64_t>(size_of(type));
      elements[i].load(row, d, aligned);
      scale[i] = type == DType::e4m3 ? __ldg(keys.scale + at) : 1.0F;
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      if (first + i < count) {
        float value[kLaneElements];
        elements[i].floats(0, value);
#pragma unroll
        for (int e = 0; e < kLaneElements; ++e) {
          sum[e] = __fadd_rn(sum[e], __fmul_rn(scale[i], value[e]));
        }
      }
    }
  }
}

// mean = elements d … d + 3 of the mean of positions first … last - 1 of a run; first is a multiple
// of the page size. In the tables all whole pages must be the run's.
__device__ inline void mean_of(const Keys& keys, const Means& means, const Run& run,
                               std::int32_t first, std::int32_t last, int d,
                               float (&mean)[kLaneElements]) {
  const bool tables = in_tables(means, run);
  for (float& element : mean) {
    element = 0;
  }
  const auto add = [&](const float(&sum)[kLaneElements]) {
#pragma unroll
    for (int e = 0; e < kLaneElements; ++e) {
      mean[e] = __fadd_rn(mean[e], sum[e]);
    }
  };
  const std::int32_t whole = tables ? last / kPageSize * kPageSize : first;
#pragma unroll 8
  for (std::int32_t page = first / kPageSize; page < whole / kPageSize; ++page) {
    const float4 sum = *reinterpret_cast<const float4*>(
        means.page_sums + (run.page_row + std::int64_t{page}) * means.dim + d);
    add({sum.x, sum.y, sum.z, sum.w});
  }
  with_dtype(keys.dtype, [&]<DType type>() {
    for (std::int64_t at = whole; at < last; at += kPageSize) {
      float sum[kLaneElements];
      sum_keys<type>(keys, means.aligned, run.start + at,
                     static_cast<int>(min(std::int64_t{kPageSize}, last - at)), d, sum);
      add(sum);
    }
  });
  const auto count = static_cast<float>(last - first);
#pragma unroll
  for (float& element : mean) {
    element /= count;
  }
}

// The parts of elements d … d + 3 of a mean, `stride` elements from one part to the next.
__device__ inline void store_mean(const float (&mean)[kLaneElements], int d, int dim,
                                  std::uint16_t* row, int stride) {
  for (int part = 0; part < kMaxParts; ++part) {
    const std::uint32_t pairs[2] = {
        upper_halves(bf16_part(mean[0], part), bf16_part(mean[1], part)),
        upper_halves(bf16_part(mean[2], part), bf16_part(mean[3], part))};
    store_operand(row + part * stride, d, dim, pairs);
  }
}

}  // namespace misa::cuda::pool
