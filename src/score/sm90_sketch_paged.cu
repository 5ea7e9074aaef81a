// SPDX-License-Identifier: Apache-2.0
// Paged scoring (sm90_paged.cuh) of the keys' sketches (core/sketch.hpp). A thread has the entries
// of two keys that a lane of a quad has, 32 neighbouring ones of each: it makes e4m3 numbers of
// their codes, which are the A operand of the products (sketch_order.hpp).
#include <cuda_fp16.h>

#include <algorithm>

#include "core/sketch.hpp"
#include "score/sketch_order.hpp"
#include "score/sm90_paged.cuh"

namespace misa::cuda::score {
namespace {

constexpr int kSteps = kDim / 32;  // products of a tile

// Byte i of the result is byte s of b a, where s is the lower three bits of nibble i of `selector`;
// if the nibble's highest bit is set, it is the sign bit of that byte, eight times.
__device__ inline std::uint32_t permute_bytes(std::uint32_t a, std::uint32_t b,
                                              std::uint32_t selector) {
  std::uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

struct SketchSource {
  const std::uint8_t* data;
  std::int64_t stride;  // bytes from one page to the next
};

template <int sketch>
struct SketchKeys {
  static constexpr int tile_keys = 128;
  static constexpr int key_bytes = static_cast<int>(sketch_code_bytes(sketch, kDim));
  static constexpr int scale_bytes = static_cast<int>(sketch_scale_bytes(sketch, kDim));
  static constexpr int tile_bytes = tile_keys * (key_bytes + scale_bytes);
  static constexpr bool signed_scales = false;
  static constexpr bool in_shared = false;
  static constexpr int stages = 16;
  using Source = SketchSource;

  static __device__ void fetch(const Source& source, const DevicePagedSource& keys,
                               std::int32_t page, std::int32_t slot, std::int32_t count,
                               std::uint8_t* tile, std::int32_t first, std::uint64_t* full,
                               std::uint64_t policy) {
    const std::uint8_t* data = source.data + page * source.stride;
    if (1 << keys.page_bits == tile_keys) {  // a page is a tile as it stands
      copy_bulk(tile, data, tile_bytes, full, policy);
      return;
    }
    copy_bulk(tile + first * key_bytes, data + slot * key_bytes, count * key_bytes, full, policy);
    copy_bulk(tile + tile_keys * key_bytes + first * scale_bytes,
              data + (key_bytes << keys.page_bits) + slot * scale_bytes, count * scale_bytes, full,
              policy);
  }
};

// A block of a tile, whose operand is in registers: of each step, the thread's elements of its
// first key, of its second key, and again.
template <int columns>
struct SketchTile {
  float sums[columns / 2];
  float scale[2];
  std::uint32_t elements[kSteps][4];

  __device__ void multiply(std::uint64_t rows) {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      wgmma_e4m3<columns>(sums, elements[step], rows + 2 * step, step > 0);
    }
  }
};

// Four equidistant levels.
struct TwoBitKeys : SketchKeys<2> {
  struct Constants {
    std::uint32_t levels;  // -1.5, -0.5, 0.5, 1.5 in e4m3
  };
  static __device__ void prepare(Constants& constants) { constants.levels = 0x3C30B0BC; }

  struct Thread {
    std::uint32_t levels;
    __device__ explicit Thread(const Constants& constants) : levels(constants.levels) {}
  };

  template <int columns>
  struct Tile : SketchTile<columns> {
    __device__ void load(const std::uint8_t* tile, const Thread& thread, int row, int lane) {
      const std::uint8_t* scales = tile + tile_keys * key_bytes;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key = row + 8 * r;
        const uint2 codes = *reinterpret_cast<const uint2*>(tile + key * key_bytes + lane % 4 * 8);
        this->scale[r] = __half2float(reinterpret_cast<const __half*>(scales)[key]);
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const std::uint32_t word = half == 0 ? codes.x : codes.y;
          const std::uint32_t even = mask(word, 0x33333333);
          const std::uint32_t odd = mask(word >> 2, 0x33333333);
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            std::uint32_t(&step)[4] = this->elements[2 * half + i];
            step[r] = permute_bytes(thread.levels, 0, even >> 16 * i);
            step[2 + r] = permute_bytes(thread.levels, 0, odd >> 16 * i);
          }
        }
      }
    }

    // a & b, which the compiler does not distribute over the shifts that follow.
    static __device__ std::uint32_t mask(std::uint32_t a, std::uint32_t b) {
      std::uint32_t result;
      asm("and.b32 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
      return result;
    }
  };
};

// MXFP4. A lane's 32 entries are one group. In e4m3 they are in units of 2^-6 times the scale
// of the key's largest group; those of a group whose scale is 2^14 below it still fit.
struct FourBitKeys : SketchKeys<4> {
  struct Constants {
    uint2 magnitudes[kSketchReach + 2];  // of codes 0 to 7, by how far a group's scale is below
  };

  static __device__ void prepare(Constants& constants) {
    for (int i = threadIdx.x; i < 8 * (kSketchReach + 2); i += kPagedThreads) {
      const int below = i / 8;
      const float value =
          below > kSketchReach ? 0.0F : e2m1_to_float(i % 8) * ldexpf(1 / kSketchUnit, -below);
      const std::uint32_t bits = __float_as_uint(value);
      const std::uint32_t code = value < 0x1p-6F ? static_cast<std::uint32_t>(value * 512)
                                                 : (bits >> 20) - ((127 - 7) << 3);
      reinterpret_cast<std::uint8_t*>(&constants)[i] = static_cast<std::uint8_t>(code);
    }
  }

  struct Thread {
    const uint2* magnitudes;
    __device__ explicit Thread(const Constants& constants) : magnitudes(constants.magnitudes) {}
  };

  template <int columns>
  struct Tile : SketchTile<columns> {
    __device__ void load(const std::uint8_t* tile, const Thread& thread, int row, int lane) {
      const std::uint8_t* scales = tile + tile_keys * key_bytes;
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        const int key = row + 8 * r;
        const uint4 codes = *reinterpret_cast<const uint4*>(tile + key * key_bytes + lane % 4 * 16);
        const std::uint32_t exponents =
            *reinterpret_cast<const std::uint32_t*>(scales + key * scale_bytes);
        const std::uint32_t pairs = __vmaxu4(exponents, exponents >> 16);
        const std::uint32_t largest = max(pairs & 0xFF, pairs >> 8 & 0xFF);
        const std::uint32_t exponent = exponents >> 8 * (lane % 4) & 0xFF;
        const uint2 table = thread.magnitudes[min(largest - exponent, kSketchReach + 1U)];
        this->scale[r] = ue8m0_to_float(static_cast<std::uint8_t>(largest)) * kSketchUnit;
        const std::uint32_t words[kSteps] = {codes.x, codes.y, codes.z, codes.w};
#pragma unroll
        for (int step = 0; step < kSteps; ++step) {
          this->elements[step][r] = four(table, words[step]);
          this->elements[step][2 + r] = four(table, words[step] >> 16);
        }
      }
    }

    // The e4m3 numbers of the four codes in the lower half of a word. For a code of negative sign,
    // the second permutation repeats the sign bit of 0x80, which sets the lowest bit.
    static __device__ std::uint32_t four(const uint2& table, std::uint32_t codes) {
      const std::uint32_t magnitudes = permute_bytes(table.x, table.y, codes & 0x7777);
      const std::uint32_t signs = permute_bytes(0x80808080, 0x80808080, codes);
      return magnitudes | (signs << 7 & 0x80808080);
    }
  };
};

// A query has at most 3 heads and a residual row, or 7, or 15, or 63, or 64 heads and no residual
// row. Where there are fewer, or no residual row, rows of zeros give the same bits. With few rows,
// a warpgroup takes two blocks of keys at once.
template <class Keys>
void launch_sketch(const SketchSource& source, PagedArguments arguments, int num_sms,
                   void* stream) {
  const int heads = arguments.rows.head_count;
  if (heads < 16) {
    arguments.group_queries =
        static_cast<std::int32_t>(std::min<std::int64_t>(most_queries(arguments.problem), 4));
  }
  if (heads < 4) {
    launch<Spec<Keys, 1, 4, true, true>>(source, arguments, num_sms, stream);
  } else if (heads < 8) {
    launch<Spec<Keys, 1, 8, true, true>>(source, arguments, num_sms, stream);
  } else if (heads < 16) {
    launch<Spec<Keys, 1, 16, true, true>>(source, arguments, num_sms, stream);
  } else if (heads < 64) {
    launch<Spec<Keys, 1, 16, false, true>>(source, arguments, num_sms, stream);
  } else {
    launch<Spec<Keys, 1, 16, false, false>>(source, arguments, num_sms, stream);
  }
}

}  // namespace

void launch_paged_sketch(const ProblemOf<DevicePagedSource>& problem, int sketch,
                         const SketchOperands& operands, std::int32_t unscored,
                         const Scores& scores, const RowLengths& lengths, int num_sms,
                         void* stream) {
  if (!any_keys(problem, lengths, stream)) {
    return;
  }
  const PagedArguments arguments{
      rows_problem(problem, operands), rows_of(operands), unscored, 1, scores, lengths};
  const SketchSource source{problem.k.sketch, problem.k.sketch_stride};
  if (is_rotated(sketch)) {
    launch_sketch<TwoBitKeys>(source, arguments, num_sms, stream);
  } else {
    launch_sketch<FourBitKeys>(source, arguments, num_sms, stream);
  }
}

}  // namespace misa::cuda::score
