// SPDX-License-Identifier: Apache-2.0
// Paged scoring (sm90_paged.cuh) of the e4m3 keys: tiles are fetched by TMA in the swizzled layout
// in which products read them.
#include <cuda.h>

#include <algorithm>

#include "cuda/tensor_map.hpp"
#include "score/sm90_paged.cuh"

namespace misa::cuda::score {
namespace {

struct Fp8Keys {
  static constexpr int tile_keys = 64;
  static constexpr int key_bytes = kDim;
  static constexpr int scale_bytes = sizeof(float);
  static constexpr int tile_bytes = tile_keys * key_bytes + 1024;  // tiles are aligned to 1024
  static constexpr bool signed_scales = true;
  static constexpr bool in_shared = true;
  // Memory answers after about 1 us, in which an SM receives 30 KB, four tiles. More stages also
  // cover the time in which the rows of new queries are loaded.
  static constexpr int stages = 16;
  using Source = CUtensorMap;
  struct Constants {};
  struct Thread {
    __device__ explicit Thread(const Constants&) {}
  };

  static __device__ void prepare(Constants&) {}

  static __device__ void fetch(const Source& map, const DevicePagedSource& keys, std::int32_t page,
                               std::int32_t slot, std::int32_t count, std::uint8_t* tile,
                               std::int32_t first, std::uint64_t* full, std::uint64_t policy) {
    copy_box(tile + first * key_bytes, map, slot, page, full, policy);
    const auto* scales = reinterpret_cast<const std::uint8_t*>(page_scales(keys, 0));
    copy_bulk(tile + tile_keys * key_bytes + first * scale_bytes,
              scales + page * keys.page_stride + slot * scale_bytes, count * scale_bytes, full,
              policy);
  }

  template <int columns>
  struct Tile {
    float sums[columns / 2];
    float scale[2];
    std::uint64_t keys;

    __device__ void load(const std::uint8_t* tile, const Thread&, int row, int) {
      keys = swizzled_tile(tile);
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        scale[r] = reinterpret_cast<const float*>(tile + tile_keys * key_bytes)[row + 8 * r];
      }
    }
    __device__ void multiply(std::uint64_t rows) {
#pragma unroll
      for (int k = 0; k < kDim / 32; ++k) {
        wgmma_e4m3<columns>(sums, keys + 2 * k, rows + 2 * k, k > 0);
      }
    }
  };
};

// A query has 64 rows, or at most 16.
constexpr int kLaneColumns = kMaxRows / 4;

template <int slices, bool packed, bool residual>
using Fp8Spec = Spec<Fp8Keys, slices, kLaneColumns, packed, residual>;
static_assert(sizeof(Fp8Spec<4, false, false>::Shared) <= 227 * 1024);

template <class Spec>
void launch_fp8(const PagedArguments& arguments, int num_sms, void* stream) {
  const DevicePagedSource& k = arguments.problem.k;
  const std::int32_t page_size = 1 << k.page_bits;
  const CUtensorMap map = tensor_map<3>(
      k.data, {kDim, static_cast<cuuint64_t>(page_size), static_cast<cuuint64_t>(k.pages)},
      {kDim, static_cast<cuuint64_t>(k.page_stride)},
      {kDim, static_cast<cuuint32_t>(std::min(page_size, Fp8Keys::tile_keys)), 1});
  launch<Spec>(map, arguments, num_sms, stream);
}

// How many slices hold the rows of so many queries.
int slices_for(std::int64_t queries, bool packed) {
  const std::int64_t of_slice = packed ? 4 : 1;
  return queries <= of_slice ? 1 : packed || queries <= 2 * of_slice ? 2 : 4;
}

template <bool packed, bool residual>
void launch_slices(const PagedArguments& arguments, int num_sms, void* stream) {
  const int slices = slices_for(arguments.group_queries, packed);
  if (slices == 1) {
    launch_fp8<Fp8Spec<1, packed, residual>>(arguments, num_sms, stream);
  } else if (slices == 2) {
    launch_fp8<Fp8Spec<2, packed, residual>>(arguments, num_sms, stream);
  } else if constexpr (!packed) {
    launch_fp8<Fp8Spec<4, packed, residual>>(arguments, num_sms, stream);
  }
}

}  // namespace

void launch_paged(const ProblemOf<DevicePagedSource>& problem, const ActiveRows& rows,
                  std::int32_t unscored, const Scores& scores, const RowLengths& lengths,
                  int num_sms, void* stream) {
  if (!any_keys(problem, lengths, stream)) {
    return;
  }
  const bool packed = rows.count() <= kLaneColumns;
  const bool residual = rows.residual != nullptr;
  const std::int64_t most = packed ? 8 : 4;
  const PagedArguments arguments{
      problem, rows,   unscored, static_cast<std::int32_t>(std::min(most_queries(problem), most)),
      scores,  lengths};
  if (packed && residual) {
    launch_slices<true, true>(arguments, num_sms, stream);
  } else if (packed) {
    launch_slices<true, false>(arguments, num_sms, stream);
  } else if (residual) {
    launch_slices<false, true>(arguments, num_sms, stream);
  } else {
    launch_slices<false, false>(arguments, num_sms, stream);
  }
}

}  // namespace misa::cuda::score
