// SPDX-License-Identifier: Apache-2.0
// Exact top-k of the candidates that passed a row's threshold: one thread block a row.
//
//  1. A row of no more than k keys selects all of them; without scores that needs no candidates.
//  2. The lists are cut into chunks that warps share out. A row that lost candidates, or has too
//     few, is a miss. Entries (entry.hpp) are held in registers and, where those do not suffice, in
//     shared memory; those of a row with more than fit are read from its lists again by every step,
//     as many as registers hold at a time.
//  3. RadixHistogram of the scores narrow down where the entry of rank k lies until few are left
//     (digits.cuh). If more have the same score, digits of their positions do.
//  4. What is above them is selected for certain: marked in a bitmap of positions. The few are
//     ranked directly, and marked if their rank is good enough. Of a row longer than a bitmap the
//     parts take turns, this step and the next.
//  5. A scan over the bitmap's words gives every selected position its rank. Positions go there in
//     shared memory, from there to the output in whole lines; scores, if wanted, follow them.
//
// No choice depends on the order of candidates, so neither does the output.
#include <cuda_runtime.h>

#include <algorithm>
#include <bit>
#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/entry.hpp"
#include "cuda/launch.cuh"
#include "cuda/range.cuh"
#include "select/fused.hpp"
#include "select/output.cuh"
#include "select/radix_histogram.cuh"

namespace misa::cuda::select {
namespace {

// Entries of a list that a warp loads at once: two a lane, 32 apart.
constexpr std::uint32_t kChunk = 64;

// Positions that one bitmap covers at most: 32 KB, and 16 KB for ranks, so that two blocks share an
// SM.
constexpr std::uint32_t kMostPositions = 1U << 18;

// Room in shared memory for `entries` of every thread, keys and positions.
template <int entries, int threads>
struct Spare {
  uint2 memory[entries][threads];
  __device__ uint2 (*rows())[threads] { return memory; }
};
template <int threads>
struct Spare<0, threads> {
  __device__ uint2 (*rows())[threads] { return nullptr; }
};

// A block of `threads` threads that hold 2 * slots entries each in registers, whose positions have
// `bits` bits, and `spare` more in shared memory; registers let `blocks` share an SM. `windows`:
// rows may be longer than a bitmap, which then takes their positions in turn.
template <int threads_, int slots_, int blocks_, int bits_, int spare_ = 0, bool windows_ = false>
struct Config {
  static constexpr int kThreads = threads_;
  static constexpr int kWarps = threads_ / 32;
  static constexpr int kSlots = slots_;
  static constexpr int kBlocks = blocks_;
  static constexpr int kBits = bits_;
  static constexpr int kSpare = spare_;
  static constexpr bool kWindows = windows_;
  static constexpr std::uint32_t kStep = 32 * 4 * threads_;  // a bitmap of four words a thread
  // Four bins a thread: digits of 10 or 11 bits leave 5 to 70 of a few thousand scores in a narrow
  // range.
  using Radix = RadixHistogram<threads_, std::bit_width(4U * threads_) - 1>;

  struct Shared {
    typename Radix::Shared radix;
    [[no_unique_address]] Spare<spare_, threads_> spare;
    std::uint64_t few[threads_];
    std::uint32_t few_count;
  };
};

// What a block's shared memory is laid out for.
struct SurvivorPlan {
  std::uint32_t top_k;
  std::uint32_t positions;
  bool empty;  // whether rows of no keys are written
};

// The lists of a row as chunks. Lane l of every warp looks after list l.
class Chunks {
 public:
  __device__ Chunks(const Candidates& candidates, std::int64_t t)
      : entries_(reinterpret_cast<const uint2*>(candidates.entries) +
                 t * candidates.lists * candidates.capacity + threadIdx.x % 32) {
    const std::uint32_t lane = threadIdx.x % 32;
    const std::uint32_t count =
        lane < candidates.lists ? candidates.counts[t * candidates.lists + lane] : 0;
    lost = __any_sync(kFullMask, count > candidates.capacity);
    const std::uint32_t filled = min(count, candidates.capacity);
    total = __reduce_add_sync(kFullMask, filled);
    const std::uint32_t own = filled / kChunk + (filled % kChunk != 0 ? 1 : 0);
    end_ = own;
#pragma unroll
    for (unsigned step = 1; step < 32; step *= 2) {
      const std::uint32_t before = __shfl_up_sync(kFullMask, end_, step);
      end_ += lane >= step ? before : 0;
    }
    this->count = __shfl_sync(kFullMask, end_, 31);
    const std::uint32_t first = lane * candidates.capacity;
    limit_ = first + filled;
    offset_ = first - (end_ - own) * kChunk;
  }

  // A chunk's first entry and how many entries follow until its list's end; 0 behind the last
  // chunk. All lanes call, each for a chunk of its own.
  __device__ uint2 find(std::uint32_t chunk) const {
    int list = 0;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      list += __shfl_sync(kFullMask, end_, list + step - 1) <= chunk ? step : 0;
    }
    const std::uint32_t first = __shfl_sync(kFullMask, offset_, list) + chunk * kChunk;
    const std::uint32_t limit = __shfl_sync(kFullMask, limit_, list);
    return {first, chunk < count ? limit - first : 0};
  }

  // The lane's two entries of the chunk that lane `from` found: x and y, z and w. Where there is
  // none, its key is kWarp. All lanes call.
  __device__ uint4 load(const uint2& found, int from) const {
    const uint2* entries = entries_ + __shfl_sync(kFullMask, found.x, from);
    const std::uint32_t left = __shfl_sync(kFullMask, found.y, from);
    const std::uint32_t lane = threadIdx.x % 32;
    uint2 first{0, kWarp};
    uint2 second{0, kWarp};
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
  bool lost;            // whether some list lost candidates

 private:
  const uint2* entries_;  // the lane's first
  std::uint32_t end_;     // behind the list's last chunk
  std::uint32_t limit_;   // behind its last entry
  std::uint32_t offset_;  // from kChunk * chunk to its entries, modulo 2^32
};

// ordered_bits of a score that is not NaN; no candidate is.
__device__ std::uint32_t key_of(std::uint32_t score) {
  const std::uint32_t bits = __float_as_uint(__uint_as_float(score) + 0.0F);
  return bits ^ (static_cast<std::uint32_t>(static_cast<std::int32_t>(bits) >> 31) | 0x80000000U);
}

// Loaded entries of a row that sees `range`, as keys of selection and positions. Absent candidates
// are visited too; their key is 0.
__device__ uint4 as_keys(const uint4& two, const Range& range) {
  const std::uint32_t first = two.y - range.start;
  const std::uint32_t second = two.w - range.start;
  const auto length = static_cast<std::uint32_t>(range.length);
  return {first < length ? key_of(two.x) : 0, first, second < length ? key_of(two.z) : 0, second};
}

// Positions of a thread's candidates, two a slot. Those of 16 bits share a register, those of 17
// leave their highest bits to one that all have; wider ones have a register each.
template <int slots, int bits>
class Positions {
 public:
  __device__ void set(int slot, std::uint32_t first, std::uint32_t second) {
    if constexpr (kPacked) {
      own_[slot] = __byte_perm(first, second, 0x5410);  // the lower halves
      if constexpr (bits == 17) {
        highest_ |= (first >> 16 & 1) << 2 * slot | (second >> 16 & 1) << (2 * slot + 1);
      }
    } else {
      own_[2 * slot] = first;
      own_[2 * slot + 1] = second;
    }
  }
  __device__ uint2 get(int slot) const {
    if constexpr (kPacked) {
      // Volatile and opaque: the compiler would unpack all of them once and keep that.
      std::uint32_t both = own_[slot];
      asm volatile("" : "+r"(both));
      uint2 two{both & 0xFFFF, both >> 16};
      if constexpr (bits == 17) {
        std::uint32_t highest = highest_;
        asm volatile("" : "+r"(highest));
        two.x |= (highest >> 2 * slot & 1) << 16;
        two.y |= (highest >> (2 * slot + 1) & 1) << 16;
      }
      return two;
    } else {
      return {own_[2 * slot], own_[2 * slot + 1]};
    }
  }

 private:
  static constexpr bool kPacked = bits <= 17;
  static_assert(2 * slots <= 32);

  std::uint32_t own_[kPacked ? slots : 2 * slots];
  std::uint32_t highest_ = 0;
};

// Candidates of a row: of the kChunks chunks from `first` on, in registers, and with `spare` of
// kSpareChunks more, there, where a thread sees its own alone.
template <class Own>
class Held {
 public:
  static constexpr std::uint32_t kChunks = Own::kSlots * Own::kWarps;
  static constexpr std::uint32_t kSpareChunks = Own::kSpare / 2 * Own::kWarps;
  // A lane finds one chunk of its warp.
  static_assert(Own::kSpare % 2 == 0 && Own::kSlots + Own::kSpare / 2 <= 32);

  __device__ Held(const Chunks& chunks, const Range& range, std::uint32_t first = 0,
                  uint2 (*spare)[Own::kThreads] = nullptr)
      : spare_(spare) {
    const uint2 found = chunks.find(first + threadIdx.x % 32 * Own::kWarps + threadIdx.x / 32);
    uint4 loaded[Own::kSlots];
#pragma unroll
    for (int slot = 0; slot < Own::kSlots; ++slot) {
      loaded[slot] = chunks.load(found, slot);
    }
#pragma unroll
    for (int slot = 0; slot < Own::kSlots; ++slot) {
      const uint4 two = as_keys(loaded[slot], range);
      keys_[slot] = {two.x, two.z};
      positions_.set(slot, two.y, two.w);
    }
    if (spare != nullptr) {
#pragma unroll 1
      for (std::uint32_t chunk = kChunks; chunk < chunks.count; chunk += Own::kWarps) {
        const uint4 two = as_keys(chunks.load(found, chunk / Own::kWarps), range);
        own(spared_++) = {two.x, two.y};
        own(spared_++) = {two.z, two.w};
      }
    }
  }
  template <class Visitor>
  __device__ void visit(const Visitor& visitor) const {
#pragma unroll
    for (int slot = 0; slot < Own::kSlots; ++slot) {
      const uint2 positions = positions_.get(slot);
      visitor(keys_[slot].x, positions.x);
      visitor(keys_[slot].y, positions.y);
    }
    if constexpr (Own::kSpare > 0) {
#pragma unroll 1
      for (int i = 0; i < spared_; ++i) {
        visitor(own(i).x, own(i).y);
      }
    }
  }
  // From now on keys order the entries of a plateau, lower positions first. Those above it have the
  // largest key, those below none.
  __device__ void settle(std::uint32_t plateau, std::uint32_t length) {
    const auto settled = [&](std::uint32_t key, std::uint32_t position) {
      return key > plateau ? kWarp : key == plateau ? length - position : 0;
    };
#pragma unroll
    for (int slot = 0; slot < Own::kSlots; ++slot) {
      const uint2 positions = positions_.get(slot);
      keys_[slot] = {settled(keys_[slot].x, positions.x), settled(keys_[slot].y, positions.y)};
    }
    if constexpr (Own::kSpare > 0) {
#pragma unroll 1
      for (int i = 0; i < spared_; ++i) {
        own(i).x = settled(own(i).x, own(i).y);
      }
    }
  }

 private:
  __device__ uint2& own(int i) const { return spare_[i][threadIdx.x]; }

  uint2 keys_[Own::kSlots];
  Positions<Own::kSlots, Own::kBits> positions_;
  uint2 (*spare_)[Own::kThreads];
  int spared_ = 0;
};

// All candidates of a row, read from their lists by every visit.
template <class Own>
class Listed {
 public:
  __device__ Listed(const Chunks& chunks, const Range& range) : chunks_(chunks), range_(range) {}

  template <class Visitor>
  __device__ void visit(const Visitor& visitor) const {
#pragma unroll 1
    for (std::uint32_t first = 0; first < chunks_.count; first += Held<Own>::kChunks) {
      Held<Own> held(chunks_, range_, first);
      if (plateau_ != 0) {
        held.settle(plateau_, range_.length);
      }
      held.visit(visitor);
    }
  }
  __device__ void settle(std::uint32_t plateau, std::uint32_t) { plateau_ = plateau; }

 private:
  Chunks chunks_;
  Range range_;
  std::uint32_t plateau_ = 0;
};

__device__ std::uint64_t entry_of(std::uint32_t key, std::uint32_t position) {
  return std::uint64_t{key} << 32 | ~position;
}

// Step 3. Keys above `high` are selected; of those in [low, high], lower positions first where they
// are equal, `quota` more.
struct Cut {
  std::uint32_t low;
  std::uint32_t high;
  std::uint32_t quota;
  bool settled;  // whether the source's keys order a plateau now
};

template <class Own, class Source>
__device__ Cut find_kth(typename Own::Shared& shared, Source& source, std::uint32_t count,
                        std::uint32_t wanted, std::uint32_t length) {
  using Radix = typename Own::Radix;
  std::uint32_t smallest = kWarp;
  std::uint32_t largest = 0;
  source.visit([&](std::uint32_t key, std::uint32_t) {
    smallest = key != 0 ? min(smallest, key) : smallest;
    largest = max(largest, key);
  });
  Bucket keys = Radix::bracket_all(shared.radix, smallest, largest, threadIdx.x == 0 ? count : 0);
  bool settled = false;
  while (keys.count > Own::kThreads && keys.above + keys.count != wanted &&
         (keys.reach != 0 || !settled)) {
    if (keys.reach == 0) {
      source.settle(keys.low, length);
      settled = true;
      keys = {1, length - 1, keys.above, keys.count};
    }
    keys = Radix::narrow(shared.radix, keys, wanted, [&](const auto& visitor) {
      source.visit([&](std::uint32_t key, std::uint32_t) { visitor(key, true); });
    });
  }
  if (keys.above + keys.count == wanted) {
    return {keys.low, keys.low - 1, 0, settled};
  }
  return {keys.low, keys.low + keys.reach, wanted - keys.above, settled};
}

// Where the output is made: after Shared follow uint32 bitmap[positions / 32], uint16
// ranks[positions / 32] and uint32 staged[top_k], the last once more for scores if they are wanted.
struct Stage {
  std::uint32_t positions;
  std::uint32_t* bitmap;
  std::uint16_t* ranks;
  std::uint32_t* staged;
  std::uint32_t* scores;
};

template <int threads>
__device__ void clear(const Stage& stage) {
  for (std::uint32_t i = threadIdx.x; i < stage.positions / 128; i += threads) {
    reinterpret_cast<uint4*>(stage.bitmap)[i] = uint4{0, 0, 0, 0};
  }
}

// Steps 4 and 5. Returns how many are staged. `listed()` has the source's keys as they were.
template <class Own, bool scores, class Source, class Lists>
__device__ std::uint32_t fill(typename Own::Shared& shared, const Stage& stage,
                              const Source& source, const Cut& cut, std::uint32_t length,
                              const Lists& listed) {
  std::uint64_t own = 0;  // the thread's of the few, if it is selected
  std::uint32_t placed = 0;
  for (std::uint32_t first = 0; first < length; first += stage.positions) {
    const auto here = [&](std::uint32_t position) {
      return !Own::kWindows || position - first < stage.positions;
    };
    const auto mark = [&](std::uint32_t position) {
      const std::uint32_t offset = position - first;
      atomicOr(&stage.bitmap[offset / 32], 1U << offset % 32);
    };
    source.visit([&](std::uint32_t key, std::uint32_t position) {
      if (key > cut.high && here(position)) {
        mark(position);
      }
    });
    if (first == 0 && cut.quota != 0) {
      source.visit([&](std::uint32_t key, std::uint32_t position) {
        if (key >= cut.low && key <= cut.high) {
          const std::uint32_t place = atomicAdd(&shared.few_count, 1U);
          if (place < Own::kThreads) {
            shared.few[place] = entry_of(key, position);
          }
        }
      });
      __syncthreads();
      const std::uint32_t few = min(shared.few_count, std::uint32_t{Own::kThreads});
      if (threadIdx.x < few) {
        own = shared.few[threadIdx.x];
        std::uint32_t rank = 0;
        for (std::uint32_t i = 0; i < few; ++i) {
          rank += shared.few[i] > own ? 1 : 0;
        }
        own = rank < cut.quota ? own : 0;
      }
    }
    if (own != 0 && here(entry_position(own))) {
      mark(entry_position(own));
    }
    __syncthreads();

    // The rank of each word's first position: a thread's words lie side by side.
    const std::uint32_t words = stage.positions / 32;
    const std::uint32_t each = words / Own::kThreads;
    const std::uint32_t begin = threadIdx.x * each;
    std::uint32_t sum = 0;
    for (std::uint32_t i = 0; i < each; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(stage.bitmap + begin + i);
      sum += __popc(four.x) + __popc(four.y) + __popc(four.z) + __popc(four.w);
    }
    std::uint32_t rank = 0;
    std::uint32_t total = 0;
    typename Own::Radix::Scan(shared.radix.scan).ExclusiveSum(sum, rank, total);
    rank += placed;
    for (std::uint32_t i = 0; i < each; i += 4) {
      const uint4 four = *reinterpret_cast<const uint4*>(stage.bitmap + begin + i);
      const std::uint32_t second = rank + __popc(four.x);
      const std::uint32_t third = second + __popc(four.y);
      const std::uint32_t fourth = third + __popc(four.z);
      *reinterpret_cast<uint2*>(stage.ranks + begin + i) = {rank | second << 16,
                                                            third | fourth << 16};
      rank = fourth + __popc(four.w);
    }
    __syncthreads();

    // Words are dealt out one by one, so that many threads share where selected keys crowd.
    for (std::uint32_t i = threadIdx.x; i < words; i += 4 * Own::kThreads) {
      std::uint32_t bits[4];
      std::uint32_t places[4];
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        bits[j] = stage.bitmap[i + j * Own::kThreads];
        places[j] = stage.ranks[i + j * Own::kThreads];
      }
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const std::uint32_t base = first + (i + j * Own::kThreads) * 32;
        for (; bits[j] != 0; bits[j] &= bits[j] - 1) {
          stage.staged[places[j]++] = base + __ffs(static_cast<int>(bits[j])) - 1;
        }
      }
    }
    if constexpr (scores) {
      const auto place = [&](std::uint32_t key, std::uint32_t position) {
        if (key == 0 || !here(position)) {
          return;
        }
        const std::uint32_t offset = position - first;
        const std::uint32_t bits = stage.bitmap[offset / 32];
        const std::uint32_t bit = 1U << offset % 32;
        if ((bits & bit) != 0) {
          stage.scores[stage.ranks[offset / 32] + __popc(bits & (bit - 1))] = key;
        }
      };
      if (cut.settled) {
        listed().visit(place);
      } else {
        source.visit(place);
      }
    }
    placed += total;
    __syncthreads();
    if (!Own::kWindows || length - first <= stage.positions) {
      break;
    }
    clear<Own::kThreads>(stage);
    __syncthreads();
  }
  return placed;
}

template <class Own, bool scores>
__global__ void __launch_bounds__(Own::kThreads, Own::kBlocks)
    survivors_kernel(const Candidates candidates, const Keys keys, const SurvivorPlan plan,
                     const TopK out, const FallbackRows fallback) {
  begin_kernel();
  constexpr int kThreads = Own::kThreads;
  extern __shared__ __align__(16) std::byte memory[];
  auto& shared = *reinterpret_cast<typename Own::Shared*>(memory);
  const std::uint32_t words = plan.positions / 32;
  auto* bitmap = reinterpret_cast<std::uint32_t*>(memory + sizeof(typename Own::Shared));
  auto* ranks = reinterpret_cast<std::uint16_t*>(bitmap + words);
  auto* staged = reinterpret_cast<std::uint32_t*>(ranks + words);
  const Stage stage{plan.positions, bitmap, ranks, staged, staged + plan.top_k};

  const std::int64_t t = blockIdx.x;
  const Chunks chunks(candidates, t);
  const Range range = visible(keys, t);
  const auto length = static_cast<std::uint32_t>(range.length);
  const OutputRow output = output_row(out, t, plan.top_k);
  const std::uint32_t wanted = min(plan.top_k, length);
  const auto write = [&](std::uint32_t count, const auto& index_of) {
    for (std::uint32_t i = threadIdx.x; i < plan.top_k; i += kThreads) {
      output.indices[i] = i < count ? static_cast<std::int32_t>(index_of(i)) : -1;
    }
  };
  if (length == 0 && !plan.empty) {
    return;
  }
  if (length == 0 || (length <= plan.top_k && !scores)) {  // step 1
    write(length, [](std::uint32_t i) { return i; });
    if constexpr (scores) {
      for (std::uint32_t i = threadIdx.x; i < plan.top_k; i += kThreads) {
        output.scores[i] = -std::numeric_limits<float>::infinity();
      }
    }
    return;
  }
  if (chunks.lost || chunks.total < wanted) {
    if (threadIdx.x == 0) {
      fallback.rows[atomicAdd(fallback.count, 1U)] = static_cast<std::int32_t>(t);
    }
    return;
  }

  Own::Radix::clear(shared.radix);
  clear<kThreads>(stage);
  if (threadIdx.x == 0) {
    shared.few_count = 0;
  }
  // Made anew where it is needed, which is seldom: kept, it would take registers of what is held.
  const auto listed = [&] { return Listed<Own>(Chunks(candidates, t), range); };
  std::uint32_t placed = 0;
  const auto select = [&](auto source) {
    const Cut cut = find_kth<Own>(shared, source, chunks.total, wanted, length);
    placed = fill<Own, scores>(shared, stage, source, cut, length, listed);
  };
  // Rows that are held stand first in the code: behind the others they took up to a tenth longer.
  if (chunks.count > Held<Own>::kChunks + Held<Own>::kSpareChunks) [[unlikely]] {
    select(listed());
  } else {
    select(Held<Own>(chunks, range, 0, shared.spare.rows()));
  }

  write(placed, [&](std::uint32_t i) { return staged[i]; });
  if constexpr (scores) {
    for (std::uint32_t i = threadIdx.x; i < plan.top_k; i += kThreads) {
      output.scores[i] =
          i < placed ? score_of_bits(stage.scores[i]) : -std::numeric_limits<float>::infinity();
    }
  }
}

template <class Own>
void launch_rows(const Candidates& candidates, const Keys& keys, std::int64_t rows,
                 std::int64_t most, int top_k, const TopK& out, bool empty,
                 const FallbackRows& fallback, void* stream) {
  const std::int64_t positions = std::min<std::int64_t>(most, kMostPositions);
  const auto steps = static_cast<std::uint32_t>((positions + Own::kStep - 1) / Own::kStep);
  const SurvivorPlan plan{static_cast<std::uint32_t>(top_k),
                          std::max(steps, std::uint32_t{1}) * Own::kStep, empty};
  const std::size_t bytes = sizeof(typename Own::Shared) + plan.positions / 32 * 6 +
                            sizeof(std::uint32_t) * top_k * (out.scores != nullptr ? 2 : 1);
  launch_kernel("survivors",
                out.scores != nullptr ? survivors_kernel<Own, true> : survivors_kernel<Own, false>,
                dim3(static_cast<unsigned>(rows)), Own::kThreads, bytes, stream, candidates, keys,
                plan, out, fallback);
}

}  // namespace

// Bounds let through about 3400 entries for 2048 wanted of 64K keys, 3900 of 128K, 4900 of 256K and
// 6400 of 1M, 5900 for 4096 of 64K and 10600 for 8192, with a standard deviation of 5 to 18 %;
// lists end in chunks that are not full. What pays is rows that share an SM, so few registers a
// row, and, where the bitmap is long, threads that scan it; and that no row among the last ones is
// read from its lists. A block has at most 190 KB of shared memory, which every device of fused
// scoring has.
void launch_survivors(const Candidates& candidates, const Keys& keys, std::int64_t rows, int top_k,
                      const TopK& out, bool empty, const FallbackRows& fallback, void* stream) {
  const std::int64_t most = std::min<std::int64_t>(keys.tokens, keys.max_keys);
  const auto launch = [&]<class Own>(Own) {
    launch_rows<Own>(candidates, keys, rows, most, top_k, out, empty, fallback, stream);
  };
  if (most <= 1 << 16) {
    if (top_k <= 2048) {
      launch(Config<256, 9, 4, 16, 4>{});
    } else if (top_k <= 4096) {
      launch(Config<256, 16, 3, 16>{});
    } else {
      launch(Config<512, 13, 2, 16>{});
    }
  } else if (most <= 1 << 17) {
    if (top_k <= 2048) {
      launch(Config<256, 9, 4, 17, 4>{});
    } else if (top_k <= 4096) {
      launch(Config<512, 8, 2, 17, 2>{});
    } else {
      launch(Config<512, 13, 2, 17>{});
    }
  } else if (most > kMostPositions) {
    launch(Config<512, 12, 2, 32, 0, true>{});
  } else if (top_k <= 2048) {
    launch(Config<512, 8, 2, 32>{});
  } else {
    launch(Config<512, 12, 2, 32>{});
  }
}

}  // namespace misa::cuda::select
