// SPDX-License-Identifier: Apache-2.0
/// \file
/// The indexers: they select the positions of its context that each query attends to.
///
///     score(t, s, J) = sum over j in J of w[t,j] * max(0, q[t,j] . k[s])
///
/// DSA selects the top k by the score over all heads. MISA (arXiv 2605.07363) routes each query to
/// a few heads and scores with those. Every indexer combines four optional stages: block filter,
/// head routing, linear residual row, re-rank. Before a re-rank, scores may be computed from a
/// sketch of the keys, which has a quarter or half of their bytes.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <span>
#include <string_view>
#include <vector>

#include "misa/context.hpp"
#include "misa/view.hpp"

namespace misa {

/// How the active heads J(t) of a query are chosen: the h heads with the largest value, where ties
/// go to the lower head and NaN ranks below every number.
enum class Router : std::uint8_t {
  all,           ///< no routing: every head scores
  pooled,        ///< mean over blocks of |w * max(0, q . block mean)| (MISA)
  nonlinearity,  ///< the error of a linear fit of the ReLU, on sampled keys (MISA-R)
  dispersion,    ///< |w| * standard deviation of max(0, q . k) over the sampled keys
  self,          ///< w * max(0, q . k of the last key that the query sees)
  qnorm,         ///< |q|
  weight,        ///< |w|
  fixed,         ///< the heads of IndexerConfig::static_heads ("static" on the command line)
};

/// What an indexer computes. The named constructors give the published configurations.
struct IndexerConfig {
  int top_k = 2048;  ///< positions selected per query, 1 or more
  Router router = Router::all;
  int heads = 0;           ///< h: routed heads, 1 to H; 0 only with residual; ignored by `all`
  int block = 1024;        ///< B of the pooled router, a multiple of 64
  bool residual = false;   ///< replace the heads that are not routed by one linear row
  int filter_block = 0;    ///< HISA's B, a multiple of 64; 0: no block filter
  int filter_blocks = 64;  ///< blocks that the filter keeps, the first and the last included
  int candidates = 0;      ///< m: positions re-ranked by all heads; 0: no re-rank
  int sketch = 0;  ///< bits an element, 2 or 4, of the sketch of e4m3 keys that the first scores
                   ///< are computed from; needs a re-rank; 0: none
  std::int64_t dense_work = 0;  ///< rows of at most this many heads x positions use DSA; 0: none
  bool ordered = false;         ///< whether the positions of a row ascend
  std::vector<std::int32_t>
      static_heads;  ///< Router::fixed: distinct heads, exactly `heads` of them

  static IndexerConfig dsa(int top_k = 2048);
  static IndexerConfig misa(int top_k = 2048, int heads = 8);
  static IndexerConfig misa_dagger(int top_k = 2048, int heads = 8, int candidates = 8192);
  static IndexerConfig misa_r(int top_k = 2048, int heads = 7, int candidates = 0);
  static IndexerConfig hisa(int top_k = 2048, int filter_block = 128, int filter_blocks = 64);

  /// Whether a row that sees n positions is computed as by DSA, with all H heads, whatever else the
  /// configuration says. True for an empty row.
  [[nodiscard]] bool takes_every_head(std::int64_t model_heads, std::int64_t n) const {
    return n * model_heads <= dense_work;
  }

  /// m if a sketch of so many bits is asked for and no m: 8 * top_k for 2 bits, 2 * top_k for 4. On
  /// rows of up to 64 * top_k keys that keeps 99.9 % of DSA's set in each trace of data/
  /// (docs/performance.md); 0 for other numbers of bits.
  static int candidates_of_sketch(int bits, int top_k = 2048);

  /// Depends on the row's length: DSA up to 512 * top_k heads x positions (16,384 positions at 64
  /// heads and top 2048), where routing and re-ranking would cost as much; MISA-R with 2 * top_k
  /// candidates for longer rows.
  static IndexerConfig automatic(int top_k = 2048);
};

/// Names of the indexers and routers as the command line and reports spell them.
std::span<const std::string_view> indexer_names();  ///< dsa, misa, misa-dagger, misa-r, hisa, auto
std::span<const std::string_view> router_names();   ///< all, pooled, … static
std::string_view name_of(Router router);

/// The configuration or router of that name; throw Error if there is none.
IndexerConfig indexer_by_name(std::string_view name, int top_k = 2048);
Router router_by_name(std::string_view name);

/// What a plan needs to know about its calls before it has their data.
struct Shape {
  std::int64_t tokens = 0;    ///< T: the most queries of one call
  std::int64_t heads = 0;     ///< H
  std::int64_t dim = 0;       ///< D
  std::int64_t max_keys = 0;  ///< the most keys seen by one query
  DType q_dtype = DType::f32;
  DType k_dtype = DType::f32;
};

/// Where the results go, and in which form; every span is row-major and an empty one is not
/// written. Rows of indices and scores may have strides; their span then ends with the last row's
/// last element. In a row that uses DSA because of dense_work, `heads` and `residual` are those of
/// an empty row.
struct Selection {
  std::span<std::int32_t>
      indices;  ///< [T, top_k] positions relative to the query's sequence, -1 on the right
  std::span<float> scores;        ///< [T, top_k] the scores that ranked them, -inf where padded
  std::span<std::int32_t> heads;  ///< [T, h] active heads, ascending; -1 for empty rows
  std::span<float> residual;      ///< [T, D] the residual row before rounding; 0 for empty rows
  /// Elements from one row of indices or scores to the next, top_k or more; 0: top_k.
  std::int64_t index_stride = 0;
  std::int64_t score_stride = 0;
  /// Only with paged keys: indices are physical slots, page * page_size + offset, in place of
  /// positions. The cache has at most 2^31 slots. On a device, where block tables are not checked,
  /// the slot of a position is -1 if its page is not one of the cache.
  bool slots = false;
  /// [T] or empty: added to the positions of each query, modulo 2^32. With ks, indices become those
  /// of keys in the ragged array. Not with slots.
  std::span<const std::int32_t> offsets = {};
};

/// A validated choice of indexer for a bounded shape on one backend: made once, run often. `run`
/// allocates nothing beyond the workspace it is given. One plan may run in several threads at once,
/// each with its own workspace.
///
/// The CUDA backends are the exception, because the arrays of this class are in host memory. There
/// a run allocates device memory for copies of its arrays and for intermediate results, and host
/// memory to pack them; workspace_bytes() is 0. The context's cap limits the intermediate results,
/// but is raised if the keys of a call need more for a single query. misa::cuda::Plan, for arrays
/// in device memory, allocates nothing.
class Plan {
 public:
  Plan(Context context, IndexerConfig config, const Shape& shape);
  ~Plan();
  Plan(Plan&&) noexcept;
  Plan& operator=(Plan&&) noexcept;

  /// Bytes that run needs, at most the context's workspace cap.
  [[nodiscard]] std::size_t workspace_bytes() const;
  [[nodiscard]] const IndexerConfig& config() const;
  [[nodiscard]] const Shape& shape() const;

  /// Writes the selection for every query. The workspace is aligned to 64 bytes and has at least
  /// workspace_bytes() bytes. Throws Error before anything is written if an argument is wrong.
  void run(const Queries& q, const Weights& w, const RaggedKeys& k, const Selection& out,
           std::span<std::byte> workspace) const;
  void run(const Queries& q, const Weights& w, const PagedKeys& k, const Selection& out,
           std::span<std::byte> workspace) const;

 private:
  struct State;
  std::unique_ptr<State> state_;
};

/// Which of the optional outputs `select` returns.
struct Want {
  bool scores = false;
  bool heads = false;
  bool residual = false;
};

/// A selection that owns its arrays; shapes as in Selection.
struct Selected {
  std::int64_t tokens = 0;
  std::int64_t top_k = 0;
  std::vector<std::int32_t> indices;
  std::vector<float> scores;
  std::vector<std::int32_t> heads;
  std::vector<float> residual;
};

/// Plans, allocates and runs in one call.
Selected select(const Context& context, const IndexerConfig& config, const Queries& q,
                const Weights& w, const RaggedKeys& k, Want want = {});
Selected select(const Context& context, const IndexerConfig& config, const Queries& q,
                const Weights& w, const PagedKeys& k, Want want = {});

/// The heads that Router::pooled chooses, computed from block means instead of keys: for callers
/// that have the means but not all keys in one place. A block may have any number of keys.
///
/// Writes out [T, heads], ascending; -1 for a query without blocks. 0 <= heads <= H. On the CPU
/// each thread allocates at most 512 KB plus 5 * D bytes per block of the longest row; the
/// context's workspace cap does not apply. Throws Error before anything is written if an argument
/// is wrong.
void route_from_means(const Context& context, const Queries& q, const Weights& w,
                      const RaggedMeans& means, int heads, std::span<std::int32_t> out);

/// The blocks that the block filter keeps, computed from block means; memory and errors as above.
///
/// Writes out [T, filter_blocks]: for each query the numbers of its first block, its last block and
/// the best of the others, ascending, with -1 on the right. A query with at most filter_blocks
/// blocks keeps all of them. filter_blocks is 2 or more.
void keep_blocks_from_means(const Context& context, const Queries& q, const Weights& w,
                            const RaggedMeans& means, int filter_blocks,
                            std::span<std::int32_t> out);

}  // namespace misa
