// SPDX-License-Identifier: Apache-2.0
/// \file
/// Calls on arrays in device memory. This header does not need the CUDA toolkit: a stream is a
/// cudaStream_t passed as `void*`.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>

#include "misa/cache.hpp"
#include "misa/error.hpp"
#include "misa/indexer.hpp"

namespace misa::cuda {

inline constexpr int kMaxTopK = 16384;

/// Scores [rows, columns] fp32 in device memory, of any origin.
struct Logits {
  const float* data = nullptr;  ///< aligned to 4 bytes; rows need no further alignment
  std::int64_t rows = 0;
  std::int64_t columns = 0;
  std::int64_t row_stride = 0;  ///< elements from one row to the next, >= columns; 0: columns
  /// [rows] int32 in device memory, or null if every row is `columns` long. A row's length is
  /// min(lengths[row], columns); zero or negative is an empty row. Nothing beyond it is read.
  const std::int32_t* lengths = nullptr;
};

/// What top_k writes, in device memory.
struct TopK {
  std::int32_t* indices = nullptr;  ///< [rows, top_k] positions, ascending; -1 on the right
  float* scores = nullptr;          ///< [rows, top_k] their scores, -inf where padded; null: none
  /// Elements from one row of indices or scores to the next, top_k or more; 0: top_k.
  std::int64_t index_stride = 0;
  std::int64_t score_stride = 0;
};

/// The top_k largest scores of every row: ties go to the lower position, NaN ranks below every
/// number, -0 equals +0. A row of no more than top_k positions selects all of them. In the written
/// scores, -0 becomes +0 and every NaN becomes the same NaN. The result of a row depends on that
/// row alone, bit for bit.
///
/// Runs on the current device, in order on `stream`, and returns at once: it neither synchronises
/// nor allocates, and may be captured into a graph.
///
/// Throws Error: invalid_argument for an argument out of range (0 <= rows, columns < 2^31,
/// 1 <= top_k <= kMaxTopK), internal, with CUDA's message, if a CUDA call fails.
void top_k(const Logits& logits, int top_k, const TopK& out, void* stream);

struct PlanOptions {
  std::int64_t total_keys = 0;  ///< L: the most keys of one call, over all sequences, if ragged
  std::size_t workspace_cap = kDefaultWorkspaceCap;  ///< limit of the workspace, in bytes
  /// "auto", "cuda", or a CUDA backend's own name, as in ContextOptions: "auto" is the backend that
  /// the environment variable MISA_BACKEND names, which must be one of these, otherwise the one of
  /// highest priority that the device can run.
  std::string_view backend = "auto";
  /// The most sequences of one call, for a plan that runs on paged keys; 0: it runs on ragged keys.
  /// With the planned max_keys rounded up to a power of two, at least 128, batch * max_keys is
  /// below 2^31.
  std::int64_t batch = 0;
  /// For how many multiprocessors (SMs) of the device the work of a call is cut, so that others are
  /// left to what runs beside it; 0: all. Results do not depend on it. It limits kernels that share
  /// out their work evenly, as scoring and routing of e4m3 do on Hopper; a kernel with a thread
  /// block for each row may take more.
  int max_sms = 0;
};

/// An indexer on the device that was current when the plan was made. Every array given to `run`,
/// including those in spans, is in device memory.
class Plan {
 public:
  /// Loads all kernels of the library too, so that any call of this header, the first one included,
  /// may be captured into a graph from then on (with a driver for CUDA 12.4 or later; an older one
  /// loads kernels when they are launched first).
  ///
  /// Throws Error: invalid_argument, workspace if the cap is too small, unsupported if the device
  /// cannot run the backend.
  Plan(const IndexerConfig& config, const Shape& shape, const PlanOptions& options);
  ~Plan();
  Plan(Plan&&) noexcept;
  Plan& operator=(Plan&&) noexcept;

  /// Bytes that run needs, at most the cap.
  [[nodiscard]] std::size_t workspace_bytes() const;
  [[nodiscard]] std::string_view backend() const;

  /// Writes the selection for every query, in order on `stream`, and returns at once: it neither
  /// synchronises nor allocates, and may be captured into a graph. Positions ascend inside a row.
  /// Slots, and positions with offsets, are made from positions by a kernel at the end of the call.
  ///
  /// The values of ks and ke cannot be checked on the host: they are clamped to 0 to L, and a row
  /// that would see more than the planned max_keys is cut off there. Rows of q and k are aligned to
  /// 16 bytes, the workspace to 256 bytes.
  ///
  /// Throws Error: invalid_argument or workspace before anything is enqueued, internal, with CUDA's
  /// message, if a CUDA call fails.
  void run(const Queries& q, const Weights& w, const RaggedKeys& k, const Selection& out,
           std::span<std::byte> workspace, void* stream) const;

  /// The same for keys in the pages of a cache, which are read in place. A captured call that is
  /// replayed sees the lengths, block tables and keys that are in memory then.
  ///
  /// A row is cut off at max_pages pages and at the planned max_keys. A query that query_starts
  /// gives to no sequence is an empty row, as every query is if the cache has no pages. Entries of
  /// the block table beyond the pages of a sequence's rows are not read. An entry that is read and
  /// names no page of the cache stands for keys of score NaN. The cache and its page stride are
  /// aligned to 16 bytes, and it has fewer than 2^32 keys. Page sums, which save reading all keys
  /// for block means, are those that append and rebuild below write; they and their stride are
  /// aligned to 16 bytes. So are the cache's sketches, which are read if they have as many bits as
  /// the config's. Where they do not, sketches are computed from the keys, except by Hopper's FP8
  /// kernels (cuda-sm90, e4m3 queries, D = 128, at most 64 rows a query, no block filter): there
  /// the call throws invalid_argument.
  void run(const Queries& q, const Weights& w, const PagedKeys& k, const Selection& out,
           std::span<std::byte> workspace, void* stream) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Bytes of workspace that the two calls below need for q [tokens, H, dim] and `count` means.
/// Throws Error, invalid_argument, for a size out of range.
std::size_t means_workspace_bytes(std::int64_t tokens, std::int64_t dim, std::int64_t count);

/// misa::route_from_means and misa::keep_blocks_from_means (misa/indexer.hpp) on the current
/// device. Every array, including those in spans, is in device memory. They run in order on
/// `stream` and return at once: they neither synchronise nor allocate, and may be captured into a
/// graph. `starts` and `ends` out of range are clamped; a `partial` out of range counts as -1. Rows
/// of q are aligned to 16 bytes, the workspace to 256 bytes. `backend` is as in PlanOptions.
///
/// Both throw Error: invalid_argument or workspace before anything is enqueued, unsupported if the
/// device cannot run the backend, internal, with CUDA's message, if a CUDA call fails.
void route_from_means(const Queries& q, const Weights& w, const RaggedMeans& means, int heads,
                      std::span<std::int32_t> out, std::span<std::byte> workspace, void* stream,
                      std::string_view backend = "auto");
void keep_blocks_from_means(const Queries& q, const Weights& w, const RaggedMeans& means,
                            int filter_blocks, std::span<std::int32_t> out,
                            std::span<std::byte> workspace, void* stream,
                            std::string_view backend = "auto");

/// The calls of misa/cache.hpp that write a paged key cache, on the current device. Every array,
/// including those in spans, is in device memory. They run in order on `stream` and return at once:
/// they neither synchronise nor allocate, and may be captured into a graph.
///
/// Keys, largest scales and sketches have the bits that the same calls write in host memory. Sums
/// are rounded as the kernels that read them round (docs/numerics.md), once per token where the CPU
/// rounds twice: after a cache has been copied between host and device memory, its sums are
/// rebuilt.
///
/// The values of slots, pages and `filled` cannot be checked on the host: slots and pages out of
/// range are skipped, `filled` is clamped. The cache's data is aligned to 4 bytes, its sketch and
/// the sketch's stride to 16.
///
/// All throw Error: invalid_argument before anything is enqueued, internal, with CUDA's message, if
/// a CUDA call fails.

/// Slots may be in any order, several of one page among them; of equal slots, the last key counts.
void append(const CacheSpan& cache, const NewKeys& keys, std::span<const std::int64_t> slots,
            void* stream, ScaleFormat format = ScaleFormat::f32);

/// The same for keys whose bytes and scales an engine has written into the slots.
void append(const CacheSpan& cache, std::span<const std::int64_t> slots, void* stream);

/// No page is in `to` twice, and none in both `from` and `to` if the caches are one.
void copy_pages(const CacheView& source, std::span<const std::int32_t> from,
                const CacheSpan& target, std::span<const std::int32_t> to, void* stream);

/// No page is in `pages` twice. An empty `filled` means that every token counts.
void rebuild(const CacheSpan& cache, std::span<const std::int32_t> pages,
             std::span<const std::int32_t> filled, void* stream);

}  // namespace misa::cuda
