// SPDX-License-Identifier: Apache-2.0
// Step 2 of survivors.cu: reads a row's lists of candidates in chunks, and holds the candidates in
// registers and spare shared memory, or rereads them for every visit. `Config` is that of
// survivors.cu.
#pragma once

#include <cstdint>

#include "core/entry.hpp"
#include "cuda/key_source.cuh"
#include "cuda/problem.hpp"
#include "cuda/warp.cuh"
#include "select/radix_histogram.cuh"

namespace misa::cuda::select {

// Entries of a list that a warp loads at once: two per lane, 32 apart.
inline constexpr std::uint32_t kChunkEntries = 64;

// The key index of an absent candidate: larger than that of any key.
inline constexpr std::uint32_t kNoKey = 0xFFFFFFFFU;

// A row's lists as one sequence of chunks; the last chunk of a list may be partly filled. In every
// warp lane l keeps track of list l.
class CandidateChunks {
 public:
  __device__ CandidateChunks(const Candidates& candidates, std::int64_t t)
      : entries_(reinterpret_cast<const uint2*>(candidates.entries) +
                 t * candidates.lists * candidates.capacity + threadIdx.x % 32) {
    const std::uint32_t lane = threadIdx.x % 32;
    const std::uint32_t list_count =
        lane < candidates.lists ? candidates.counts[t * candidates.lists + lane] : 0;
    overflowed = __any_sync(kFullMask, list_count > candidates.capacity);
    const std::uint32_t filled = min(list_count, candidates.capacity);
    total = __reduce_add_sync(kFullMask, filled);
    const std::uint32_t chunks = filled / kChunkEntries + (filled % kChunkEntries != 0 ? 1 : 0);
    end_ = chunks;
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
      const std::uint32_t before = __shfl_up_sync(kFullMask, end_, step);
      end_ += lane >= step ? before : 0;
    }
    count = __shfl_sync(kFullMask, end_, 31);
    const std::uint32_t first = lane * candidates.capacity;
    limit_ = first + filled;
    offset_ = first - (end_ - chunks) * kChunkEntries;
  }

  // The index of a chunk's first entry, and how many entries follow it up to the end of its list; 0
  // beyond the last chunk. All lanes call, each for its own chunk.
  __device__ uint2 locate(std::uint32_t chunk) const {
    int list = 0;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      list += __shfl_sync(kFullMask, end_, list + step - 1) <= chunk ? step : 0;
    }
    const std::uint32_t first = __shfl_sync(kFullMask, offset_, list) + chunk * kChunkEntries;
    const std::uint32_t limit = __shfl_sync(kFullMask, limit_, list);
    return {first, chunk < count ? limit - first : 0};
  }

  // The lane's two entries, (x, y) and (z, w), of the chunk that lane `from` located. An absent
  // entry has the key index kNoKey. All lanes call.
  __device__ uint4 load(const uint2& located, int from) const {
    const uint2* entries = entries_ + __shfl_sync(kFullMask, located.x, from);
    const std::uint32_t left = __shfl_sync(kFullMask, located.y, from);
    const std::uint32_t lane = threadIdx.x % 32;
    uint2 first{0, kNoKey};
    uint2 second{0, kNoKey};
    if (lane < left) {
      first = entries[0];
    }
    if (lane + 32 < left) {
      second = entries[32];
    }
    return {first.x, first.y, second.x, second.y};
  }

  std::uint32_t total;  // candidates
  std::uint32_t count;  // chunks
  bool overflowed;      // whether a list lost candidates

 private:
  const uint2* entries_;  // of the row, from the lane's first one on
  std::uint32_t end_;     // one past the list's last chunk
  std::uint32_t limit_;   // one past the list's last entry
  std::uint32_t offset_;  // offset_ + kChunkEntries * chunk is a chunk's first entry, modulo 2^32
};

// A candidate's key in this selection: ordered_bits of its score, which is never NaN.
__device__ inline std::uint32_t candidate_key(std::uint32_t score) {
  const std::uint32_t bits = __float_as_uint(__uint_as_float(score) + 0.0F);
  return bits ^ (static_cast<std::uint32_t>(static_cast<std::int32_t>(bits) >> 31) | 0x80000000U);
}

// Two loaded entries of a row that sees `range`, as (key, position) twice. Absent candidates have
// the key 0.
__device__ inline uint4 to_keys(const uint4& loaded, const Range& range) {
  const std::uint32_t first = position_in(range, loaded.y);
  const std::uint32_t second = position_in(range, loaded.w);
  const auto length = static_cast<std::uint32_t>(range.length);
  return {first < length ? candidate_key(loaded.x) : 0, first,
          second < length ? candidate_key(loaded.z) : 0, second};
}

// Positions of a thread's candidates, two per slot. Two positions of 16 bits share a register; with
// 17 bits, one further register holds the highest bits of all positions; wider positions take a
// register each.
template <int slots, int bits>
class PackedPositions {
 public:
  __device__ void set(int slot, std::uint32_t first, std::uint32_t second) {
    if constexpr (kPacked) {
      words_[slot] = __byte_perm(first, second, 0x5410);  // the lower halves
      if constexpr (bits == 17) {
        highest_ |= (first >> 16 & 1) << 2 * slot | (second >> 16 & 1) << (2 * slot + 1);
      }
    } else {
      words_[2 * slot] = first;
      words_[2 * slot + 1] = second;
    }
  }
  __device__ uint2 get(int slot) const {
    if constexpr (kPacked) {
      // Hides the value from the compiler, which would otherwise unpack all positions once and keep
      // them in registers.
      std::uint32_t packed = words_[slot];
      asm volatile("" : "+r"(packed));
      uint2 positions{packed & 0xFFFF, packed >> 16};
      if constexpr (bits == 17) {
        std::uint32_t highest = highest_;
        asm volatile("" : "+r"(highest));
        positions.x |= (highest >> 2 * slot & 1) << 16;
        positions.y |= (highest >> (2 * slot + 1) & 1) << 16;
      }
      return positions;
    } else {
      return {words_[2 * slot], words_[2 * slot + 1]};
    }
  }

 private:
  static constexpr bool kPacked = bits <= 17;
  static_assert(2 * slots <= 32);

  std::uint32_t words_[kPacked ? slots : 2 * slots];
  std::uint32_t highest_ = 0;
};

// Candidates that a thread block holds: the kChunks chunks from `first` on in registers and, if
// `spare` is not null, up to kSpareChunks more in `spare`. Each thread visits only the candidates
// that it holds itself.
template <class Config>
class RegisterCandidates {
 public:
  static constexpr std::uint32_t kChunks = Config::kSlots * Config::kWarps;
  static constexpr std::uint32_t kSpareChunks = Config::kSpareEntries / 2 * Config::kWarps;
  // Each lane locates one chunk of its warp.
  static_assert(Config::kSpareEntries % 2 == 0 && Config::kSlots + Config::kSpareEntries / 2 <= 32);

  __device__ RegisterCandidates(const CandidateChunks& chunks, const Range& range,
                                std::uint32_t first = 0, uint2 (*spare)[Config::kThreads] = nullptr)
      : spare_(spare) {
    const uint2 located =
        chunks.locate(first + threadIdx.x % 32 * Config::kWarps + threadIdx.x / 32);
    uint4 loaded[Config::kSlots];
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      loaded[slot] = chunks.load(located, slot);
    }
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      const uint4 pair = to_keys(loaded[slot], range);
      keys_[slot] = {pair.x, pair.z};
      positions_.set(slot, pair.y, pair.w);
    }
    if (spare != nullptr) {
#pragma unroll 1
      for (std::uint32_t chunk = kChunks; chunk < chunks.count; chunk += Config::kWarps) {
        const uint4 pair = to_keys(chunks.load(located, chunk / Config::kWarps), range);
        spare_entry(spare_count_++) = {pair.x, pair.y};
        spare_entry(spare_count_++) = {pair.z, pair.w};
      }
    }
  }
  // Absent candidates are visited too, with the key 0.
  template <class Visitor>
  __device__ void visit(const Visitor& visitor) const {
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      const uint2 positions = positions_.get(slot);
      visitor(keys_[slot].x, positions.x);
      visitor(keys_[slot].y, positions.y);
    }
    if constexpr (Config::kSpareEntries > 0) {
#pragma unroll 1
      for (int i = 0; i < spare_count_; ++i) {
        visitor(spare_entry(i).x, spare_entry(i).y);
      }
    }
  }
  // Replaces the keys so that they order the candidates whose key is `tied`, lower positions first.
  // Candidates with a larger key get kLargestKey, those with a smaller one 0.
  __device__ void order_by_position(std::uint32_t tied, std::uint32_t length) {
    const auto position_key = [&](std::uint32_t key, std::uint32_t position) {
      return key > tied ? kLargestKey : key == tied ? length - position : 0;
    };
#pragma unroll
    for (int slot = 0; slot < Config::kSlots; ++slot) {
      const uint2 positions = positions_.get(slot);
      keys_[slot] = {position_key(keys_[slot].x, positions.x),
                     position_key(keys_[slot].y, positions.y)};
    }
    if constexpr (Config::kSpareEntries > 0) {
#pragma unroll 1
      for (int i = 0; i < spare_count_; ++i) {
        spare_entry(i).x = position_key(spare_entry(i).x, spare_entry(i).y);
      }
    }
  }

 private:
  __device__ uint2& spare_entry(int i) const { return spare_[i][threadIdx.x]; }

  uint2 keys_[Config::kSlots];
  PackedPositions<Config::kSlots, Config::kPositionBits> positions_;
  uint2 (*spare_)[Config::kThreads];
  int spare_count_ = 0;  // of the thread
};

// All candidates of a row, reread from their lists by every visit, as many at a time as registers
// hold.
template <class Config>
class RereadCandidates {
 public:
  __device__ RereadCandidates(const CandidateChunks& chunks, const Range& range)
      : chunks_(chunks), range_(range) {}

  template <class Visitor>
  __device__ void visit(const Visitor& visitor) const {
#pragma unroll 1
    for (std::uint32_t first = 0; first < chunks_.count;
         first += RegisterCandidates<Config>::kChunks) {
      RegisterCandidates<Config> candidates(chunks_, range_, first);
      if (tied_ != 0) {
        candidates.order_by_position(tied_, range_.length);
      }
      candidates.visit(visitor);
    }
  }
  __device__ void order_by_position(std::uint32_t tied, std::uint32_t /*length*/) { tied_ = tied; }

 private:
  CandidateChunks chunks_;
  Range range_;
  std::uint32_t tied_ = 0;  // 0: visit the keys as they are
};

}  // namespace misa::cuda::select
