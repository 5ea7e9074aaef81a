// SPDX-License-Identifier: Apache-2.0
// Step 2 of gathered scoring (sm90_fp8_gathered.cu): which keys a thread copies, and from where.
#pragma once

#include <cstdint>
#include <limits>

#include "cuda/key_source.cuh"
#include "cuda/ptx/shared.cuh"
#include "cuda/warp.cuh"
#include "score/sm90_fp8.hpp"
#include "score/sm90_fp8_config.cuh"

namespace misa::cuda::score {

inline constexpr float kNaN = std::numeric_limits<float>::quiet_NaN();

inline constexpr int kTile = kGatheredTile;

// A key is copied in 16-byte chunks, one per thread, so that a warp copies kKeysAtOnce keys at
// once, and each thread helps to copy kThreadKeys of its warp's 32 keys.
inline constexpr int kChunks = kDim / 16;
inline constexpr int kKeysAtOnce = 32 / kChunks;
inline constexpr int kThreadKeys = 32 / kKeysAtOnce;
static_assert(kTile == kWarpgroupThreads, "a thread copies a scale");

template <class Source>
struct GatheredArguments {
  ProblemOf<Source> problem;
  ActiveRows rows;
  Columns columns;
  const std::int32_t* lengths;
  std::int32_t unscored;
  const float* scales;  // of ragged keys
  Scores scores;
};

// Step 2 for one thread: tiles first, first + step, …. With `blocks` the entries of the list are
// blocks of positions, each a multiple of the 32 keys that a warp copies; otherwise they are single
// positions.
template <class Source, bool blocks>
class Gather;

template <bool blocks>
class Gather<DeviceRaggedSource, blocks> {
 public:
  using Arguments = GatheredArguments<DeviceRaggedSource>;

  __device__ Gather(const Arguments& arguments, std::int64_t t, std::int32_t first,
                    std::int32_t step)
      : list_(arguments.columns.list + t * arguments.columns.width),
        column_(static_cast<std::uint32_t>(first) * kTile + threadIdx.x),
        last_entry_(static_cast<std::uint32_t>(arguments.columns.width) - 1),
        step_columns_(static_cast<std::uint32_t>(step) * kTile),
        block_size_(static_cast<std::uint32_t>(arguments.columns.block)),
        key_stride_(static_cast<std::uint64_t>(key_pitch<DType::e4m3>(arguments.problem.k))) {
    const unsigned warp = threadIdx.x / 32 * 32;
    const unsigned row = warp + threadIdx.x % 32 / kChunks;
    chunk_offset_ = row * kDim + (threadIdx.x % kChunks ^ row % 8) * 16;
    entry_slot_ = warp + threadIdx.x % kKeysAtOnce * kThreadKeys + threadIdx.x % 32 / kKeysAtOnce;
    if constexpr (blocks) {
      block_index_ = (column_ - threadIdx.x % 32) / block_size_;
      block_offset_ = (column_ - threadIdx.x % 32) % block_size_;
    }
    entry_ = look_up();
  }

  // Sets the keys that the query sees, at least one. To be called before the first copy().
  __device__ void set_range(const Arguments& arguments, const Range& range) {
    keys_ = reinterpret_cast<const std::uint8_t*>(
                key_address<DType::e4m3>(arguments.problem.k, range.start)) +
            threadIdx.x % kChunks * 16;
    scales_ = arguments.scales + range.start;
    last_position_ = static_cast<std::uint32_t>(range.length) - 1;
    if constexpr (!blocks) {
#pragma unroll
      for (unsigned i = 0; i < kThreadKeys; ++i) {
        positions_[i] =
            __shfl_sync(kFullMask, entry_, i * kKeysAtOnce + threadIdx.x % 32 / kChunks);
      }
    }
    // Hides the values from the compiler, so that it computes an address by one multiply-add.
    asm("" : "+l"(keys_), "+l"(scales_), "+l"(list_));
  }

  // Starts the copies of a tile and of the list entries of the tile after it. For columns after the
  // query's last one it copies some key that the query sees; its score is not stored.
  __device__ void copy(std::uint8_t* keys, float* scales, std::uint32_t* positions) {
    if constexpr (blocks) {
      const std::uint32_t base = entry_ * block_size_ + block_offset_;
      entry_ = base + threadIdx.x % 32;
#pragma unroll
      for (unsigned i = 0; i < kThreadKeys; ++i) {
        positions_[i] = base + i * kKeysAtOnce + threadIdx.x % 32 / kChunks;
      }
    }
    copy_4(scales + threadIdx.x, scales_ + min(entry_, last_position_));
#pragma unroll
    for (unsigned i = 0; i < kThreadKeys; ++i) {
      // The swizzled chunks of keys that are kKeysAtOnce apart differ in one bit.
      const std::uint32_t offset =
          (chunk_offset_ ^ i % 2 * kKeysAtOnce * 16) + i * kKeysAtOnce * kDim;
      copy_16(keys + offset,
              keys_ + std::uint64_t{min(positions_[i], last_position_)} * key_stride_);
    }
    column_ += step_columns_;
    if constexpr (blocks) {
      block_index_ += step_columns_ / block_size_;
      block_offset_ += step_columns_ % block_size_;
      if (block_offset_ >= block_size_) {
        block_offset_ -= block_size_;
        ++block_index_;
      }
      entry_ = look_up();
    } else {
      copy_4(positions + entry_slot_, list_ + min(column_, last_entry_));
    }
  }

  // Reads the list entries that copy() fetched, once they are in shared memory for the whole warp.
  __device__ void read(const std::uint32_t* positions) {
    if constexpr (!blocks) {
      const auto* vectors =
          reinterpret_cast<const uint4*>(positions + threadIdx.x / kChunks * kThreadKeys);
      const uint4 low = vectors[0];
      const uint4 high = vectors[1];
      positions_[0] = low.x;
      positions_[1] = low.y;
      positions_[2] = low.z;
      positions_[3] = low.w;
      positions_[4] = high.x;
      positions_[5] = high.y;
      positions_[6] = high.z;
      positions_[7] = high.w;
      entry_ = positions[entry_slot_];
    }
  }

 private:
  __device__ std::uint32_t look_up() const {
    return static_cast<std::uint32_t>(
        __ldg(list_ + min(blocks ? block_index_ : column_, last_entry_)));
  }

  const std::int32_t* list_;
  const std::uint8_t* keys_ = nullptr;  // the thread's chunk of the first key that the query sees
  const float* scales_ = nullptr;       // from the first key that the query sees on
  std::uint32_t last_position_ = 0;     // the last position that the query sees
  std::uint32_t column_;                // the column of the next tile whose scale the thread copies
  std::uint32_t last_entry_;            // index of the list's last entry
  std::uint32_t step_columns_;          // columns from one tile to the next
  std::uint32_t block_size_;
  std::uint64_t key_stride_;
  std::uint32_t chunk_offset_;  // in a tile: the thread's chunk of the first keys that it copies
  std::uint32_t entry_slot_;    // in `positions`: the entry of column_
  std::uint32_t entry_;  // the list's entry for column_: a position or, with `blocks`, a block
  std::uint32_t positions_[kThreadKeys];  // of the keys that the thread helps to copy
  std::uint32_t block_index_ = 0;         // with `blocks`: which entry has the warp's first column,
  std::uint32_t block_offset_ = 0;        // and which position of that block the column is
};
static_assert(2 * kKeysAtOnce == 8, "a warp copies half of a swizzle's rows at once");
static_assert(kThreadKeys == 8, "two vectors");

// The same for paged keys. Looking up a key takes two reads, one after the other: its position in
// the list and its page in the block table. Each is started a tile before the next step needs it.
// With single positions a thread looks up the key whose scale it copies, and the warp's threads
// exchange the keys' indices in the cache, page * page size + slot. With blocks the keys of a warp
// lie in one page, and each thread looks that up.
template <bool blocks>
class Gather<DevicePagedSource, blocks> {
 public:
  using Arguments = GatheredArguments<DevicePagedSource>;

  __device__ Gather(const Arguments& arguments, std::int64_t t, std::int32_t first,
                    std::int32_t step)
      : keys_(arguments.problem.k),
        list_(arguments.columns.list + t * arguments.columns.width),
        column_(static_cast<std::uint32_t>(first) * kTile + threadIdx.x),
        last_entry_(static_cast<std::uint32_t>(arguments.columns.width) - 1),
        step_columns_(static_cast<std::uint32_t>(step) * kTile),
        block_size_(static_cast<std::uint32_t>(arguments.columns.block)) {
    const unsigned warp = threadIdx.x / 32 * 32;
    const unsigned row = warp + threadIdx.x % 32 / kChunks;
    chunk_offset_ = row * kDim + (threadIdx.x % kChunks ^ row % 8) * 16;
    entry_slot_ = warp + threadIdx.x % kKeysAtOnce * kThreadKeys + threadIdx.x % 32 / kKeysAtOnce;
    if constexpr (blocks) {
      block_index_ = (column_ - threadIdx.x % 32) / block_size_;
      block_offset_ = (column_ - threadIdx.x % 32) % block_size_;
    }
    entry_ = look_up();
  }

  // Sets the keys that the query sees, at least one. To be called before the first copy().
  __device__ void set_range(const Arguments& /*arguments*/, const Range& range) {
    table_ = keys_.block_table +
             static_cast<std::int64_t>(range.start >> keys_.sequence_bits) * keys_.table_stride;
    last_position_ = static_cast<std::uint32_t>(range.length) - 1;
    next_entry();
    if constexpr (!blocks) {
      const std::uint32_t index = next_index();
#pragma unroll
      for (unsigned i = 0; i < kThreadKeys; ++i) {
        indices_[i] = __shfl_sync(kFullMask, index, i * kKeysAtOnce + threadIdx.x % 32 / kChunks);
      }
      next_entry();
    }
  }

  // Starts the copies of a tile, and the look-ups of the tiles after it. For columns after the
  // query's last one it copies some key that the query sees; its score is not stored.
  __device__ void copy(std::uint8_t* keys, float* scales, std::uint32_t* indices) {
    if constexpr (blocks) {
      const bool exists = page_exists();
      const std::int64_t page = exists ? page_ : 0;
      const std::uint8_t* const chunk =
          keys_.data + page * keys_.page_stride + threadIdx.x % kChunks * 16;
#pragma unroll
      for (unsigned i = 0; i < kThreadKeys; ++i) {
        copy_chunk(
            keys, i,
            chunk +
                slot_of_position(position_ + i * kKeysAtOnce + threadIdx.x % 32 / kChunks) * kDim);
      }
      copy_scale(scales, exists, page, slot_of_position(position_ + threadIdx.x % 32));
    } else {
      const std::uint8_t* const chunk = keys_.data + threadIdx.x % kChunks * 16;
#pragma unroll
      for (unsigned i = 0; i < kThreadKeys; ++i) {
        copy_chunk(keys, i,
                   chunk + std::int64_t{indices_[i] >> keys_.page_bits} * keys_.page_stride +
                       slot(indices_[i]) * kDim);
      }
      copy_scale(scales, index_ != kNone, index_ >> keys_.page_bits, slot(index_));
      indices[entry_slot_] = next_index();
    }
    next_entry();
  }

  // Reads the indices that copy() stored, once all threads of the warp have.
  __device__ void read(const std::uint32_t* indices) {
    if constexpr (!blocks) {
      const auto* vectors =
          reinterpret_cast<const uint4*>(indices + threadIdx.x / kChunks * kThreadKeys);
      const uint4 low = vectors[0];
      const uint4 high = vectors[1];
      indices_[0] = low.x;
      indices_[1] = low.y;
      indices_[2] = low.z;
      indices_[3] = low.w;
      indices_[4] = high.x;
      indices_[5] = high.y;
      indices_[6] = high.z;
      indices_[7] = high.w;
    }
  }

 private:
  static constexpr std::uint32_t kNone = ~0U;  // of a key whose page does not exist

  __device__ std::uint32_t look_up() const {
    return static_cast<std::uint32_t>(
        __ldg(list_ + min(blocks ? block_index_ : column_, last_entry_)));
  }
  // Starts to look up the page of entry_, and the entry of the tile after it.
  __device__ void next_entry() {
    position_ = blocks ? entry_ * block_size_ + block_offset_ : entry_;
    page_ = __ldg(table_ + (min(position_, last_position_) >> keys_.page_bits));
    column_ += step_columns_;
    if constexpr (blocks) {
      block_index_ += step_columns_ / block_size_;
      block_offset_ += step_columns_ % block_size_;
      if (block_offset_ >= block_size_) {
        block_offset_ -= block_size_;
        ++block_index_;
      }
    }
    entry_ = look_up();
  }
  // Sets index_ to the key of position_. Returns an index that exists in any case.
  __device__ std::uint32_t next_index() {
    const std::uint32_t index =
        static_cast<std::uint32_t>(page_) << keys_.page_bits | slot_of_position(position_);
    index_ = page_exists() ? index : kNone;
    return page_exists() ? index : 0;
  }
  __device__ std::uint32_t slot(std::uint32_t index) const {
    return index & ((1U << keys_.page_bits) - 1);
  }
  __device__ std::uint32_t slot_of_position(std::uint32_t position) const {
    return slot(min(position, last_position_));
  }
  __device__ bool page_exists() const { return page_ >= 0 && page_ < keys_.pages; }

  __device__ void copy_chunk(std::uint8_t* keys, unsigned i, const std::uint8_t* chunk) const {
    // The swizzled chunks of keys that are kKeysAtOnce apart differ in one bit.
    const std::uint32_t offset =
        (chunk_offset_ ^ i % 2 * kKeysAtOnce * 16) + i * kKeysAtOnce * kDim;
    copy_16(keys + offset, chunk);
  }
  __device__ void copy_scale(float* scales, bool exists, std::int64_t page,
                             std::uint32_t slot) const {
    if (exists) {
      copy_4(scales + threadIdx.x, page_scales(keys_, page) + slot);
    } else {
      scales[threadIdx.x] = kNaN;
    }
  }

  const DevicePagedSource& keys_;
  const std::int32_t* list_;
  const std::int32_t* table_ = nullptr;  // the row of the query's sequence
  std::uint32_t last_position_ = 0;      // the last position that the query sees
  std::uint32_t column_;                 // the column of entry_
  std::uint32_t last_entry_;             // index of the list's last entry
  std::uint32_t step_columns_;           // columns from one tile to the next
  std::uint32_t block_size_;
  std::uint32_t chunk_offset_;  // in a tile: the thread's chunk of the first keys that it copies
  std::uint32_t entry_slot_;    // in the exchanged indices: that of the thread's column
  // The look-ups in flight, of the thread's column or, with `blocks`, of the warp's first one. The
  // position and its page are those of the tile that is copied next with `blocks`, otherwise of the
  // tile after it; the list's entry is that of one tile more.
  std::uint32_t entry_;
  std::uint32_t position_ = 0;
  std::int32_t page_ = 0;
  // Without `blocks`: keys of the tile that is copied next.
  std::uint32_t index_ = 0;             // of the thread's column
  std::uint32_t indices_[kThreadKeys];  // of the keys that the thread helps to copy
  std::uint32_t block_index_ = 0;       // of entry_, with `blocks`: its place in the list, and
  std::uint32_t block_offset_ = 0;      // which position of the block the column is
};

}  // namespace misa::cuda::score
