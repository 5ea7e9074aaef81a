/* SPDX-License-Identifier: Apache-2.0 */
/**
 * \file
 * The C interface: what the C++ headers of this folder offer, through opaque handles and plain
 * structs. The C++ headers say what each field means in full.
 *
 * Every function that can fail returns a misa_status and leaves a message for misa_last_error. No
 * exception crosses this interface and nothing aborts. Outputs are written only on success.
 *
 * Structs have no size or version field: a struct never changes while the soname of the shared
 * library stays the same, and additions are new structs with new functions. The loader therefore
 * refuses a caller that was built for another layout.
 *
 * Zero a struct, then fill it in: a stride of 0 means dense, and a null optional array is absent.
 * The count next to an array is in elements.
 */
#ifndef MISA_MISA_H
#define MISA_MISA_H

#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
#define MISA_NOEXCEPT noexcept
extern "C" {
#else
#define MISA_NOEXCEPT
#endif

typedef enum misa_status {
  MISA_OK = 0,
  MISA_INVALID_ARGUMENT = 1, /**< a shape, dtype, stride, value or pointer is wrong */
  MISA_UNSUPPORTED = 2,      /**< no backend of this build or machine can do it */
  MISA_WORKSPACE = 3,        /**< the workspace or its cap is too small */
  MISA_IO = 4,               /**< a file could not be read or written */
  MISA_INTERNAL = 5,         /**< a defect of this library */
  MISA_OUT_OF_MEMORY = 6
} misa_status;

/** A dtype. */
enum { MISA_F32 = 0, MISA_BF16 = 1, MISA_E4M3 = 2 };

/** A scale format. */
enum { MISA_SCALE_F32 = 0, MISA_SCALE_UE8M0 = 1 };

/** A router. */
enum {
  MISA_ROUTER_ALL = 0,
  MISA_ROUTER_POOLED = 1,
  MISA_ROUTER_NONLINEARITY = 2,
  MISA_ROUTER_DISPERSION = 3,
  MISA_ROUTER_SELF = 4,
  MISA_ROUTER_QNORM = 5,
  MISA_ROUTER_WEIGHT = 6,
  MISA_ROUTER_STATIC = 7
};

/** The message of this thread's last failed call; empty if none has failed. Valid until the
 * thread's next failure. */
const char* misa_last_error(void) MISA_NOEXCEPT;

/** "major.minor.patch" */
const char* misa_version(void) MISA_NOEXCEPT;

/* Backends and contexts */

typedef struct misa_backend_info {
  const char* name; /**< the strings live as long as the library is loaded */
  const char* isa;
  const char* requirement;
  int32_t available; /**< 0 or 1 */
  int32_t priority;
} misa_backend_info;

/** How many backends this build has, available or not. */
misa_status misa_backend_count(size_t* count) MISA_NOEXCEPT;

/** The backend at an index, in order of decreasing priority. */
misa_status misa_backend_at(size_t index, misa_backend_info* info) MISA_NOEXCEPT;

typedef struct misa_context_options {
  const char* backend;  /**< "auto", "cpu", "cuda" or a backend's own name; null: "auto" */
  int32_t threads;      /**< 0: as many as the process may use */
  size_t workspace_cap; /**< limit of a plan's workspace, bytes; 0: misa_default_workspace_cap() */
} misa_context_options;

/** The limit that a workspace_cap of 0 means, in bytes. */
size_t misa_default_workspace_cap(void) MISA_NOEXCEPT;

typedef struct misa_context misa_context;

/** options may be null: all defaults. */
misa_status misa_context_create(const misa_context_options* options,
                                misa_context** context) MISA_NOEXCEPT;

/** Plans made from the context stay valid. Null is ignored. */
void misa_context_destroy(misa_context* context) MISA_NOEXCEPT;

/* Plans */

typedef struct misa_config {
  int32_t top_k;
  int32_t router;
  int32_t heads;
  int32_t block;
  int32_t residual; /**< 0 or 1 */
  int32_t filter_block;
  int32_t filter_blocks;
  int32_t candidates;
  int32_t ordered; /**< 0 or 1 */
  const int32_t* static_heads;
  size_t static_head_count;
  int64_t dense_work;
  int32_t sketch; /**< bits an element: 0, 2 or 4 */
} misa_config;

/** The defaults of an indexer: "dsa", "misa", "misa-dagger", "misa-r", "hisa" or "auto". */
misa_status misa_config_by_name(const char* indexer, misa_config* config) MISA_NOEXCEPT;

typedef struct misa_shape {
  int64_t tokens;
  int64_t heads;
  int64_t dim;
  int64_t max_keys;
  int32_t q_dtype;
  int32_t k_dtype;
} misa_shape;

typedef struct misa_plan misa_plan;

/** The configuration is copied, its static heads included. */
misa_status misa_plan_create(const misa_context* context, const misa_config* config,
                             const misa_shape* shape, misa_plan** plan) MISA_NOEXCEPT;

/** Null is ignored. */
void misa_plan_destroy(misa_plan* plan) MISA_NOEXCEPT;

/** Bytes of host memory that a run needs, at most the context's cap. A run allocates nothing else,
 * except on a CUDA backend: there this is 0, and a run allocates device memory for copies of its
 * arrays and for intermediate results (misa/indexer.hpp). */
misa_status misa_plan_workspace_bytes(const misa_plan* plan, size_t* bytes) MISA_NOEXCEPT;

/* Runs */

typedef struct misa_queries {
  const void* data; /**< q [T, H, D] */
  int32_t dtype;
  int64_t tokens;
  int64_t heads;
  int64_t dim;
  int64_t token_stride;
  int64_t head_stride;
} misa_queries;

typedef struct misa_weights {
  const float* data; /**< w [T, H] */
  int64_t tokens;
  int64_t heads;
  int64_t token_stride;
} misa_weights;

typedef struct misa_ragged_keys {
  const void* data; /**< k [L, D] */
  int32_t dtype;
  int64_t tokens;
  int64_t dim;
  int64_t token_stride;
  const float* scale;    /**< [L], for e4m3 only */
  const int32_t* starts; /**< ks [T] */
  size_t start_count;
  const int32_t* ends; /**< ke [T] */
  size_t end_count;
} misa_ragged_keys;

typedef struct misa_cache_view {
  const uint8_t* data; /**< [pages, page_size, D + 4] */
  int64_t pages;
  int64_t dim;
  int64_t page_stride;    /**< bytes */
  const float* page_sums; /**< [pages, page_size / 64, D] or null */
  int64_t page_size;      /**< 32, 64 or 128; 0: 64 */
  int64_t page_sums_stride;
  const float* largest_scales; /**< [pages, page_size / 64] or null */
  int64_t largest_scales_stride;
  const uint8_t* sketch; /**< the sketch of each page, or null */
  int32_t sketch_bits;   /**< 2 or 4; 0 without a sketch */
  int64_t sketch_stride; /**< bytes */
} misa_cache_view;

typedef struct misa_paged_keys {
  misa_cache_view cache;
  const int32_t* block_table; /**< [batch, max_pages] */
  int64_t max_pages;
  int64_t block_table_stride;
  const int32_t* context_lens; /**< [batch], or null if there are row_lens */
  size_t batch;                /**< entries of context_lens */
  int64_t next_n;              /**< queries per sequence, 1 or more */
  const int32_t* query_starts; /**< [batch + 1], or null: next_n queries per sequence */
  size_t query_start_count;
  const int32_t* row_lens; /**< [T], or null */
  size_t row_len_count;
} misa_paged_keys;

/** Each array is row-major; one of count 0 is not written. Rows of indices and scores may have
 * strides; the count of such an array ends with the last row's last element. */
typedef struct misa_selection {
  int32_t* indices; /**< [T, top_k] */
  size_t index_count;
  float* scores; /**< [T, top_k] */
  size_t score_count;
  int32_t* heads; /**< [T, h] */
  size_t head_count;
  float* residual; /**< [T, D] */
  size_t residual_count;
  int64_t index_stride; /**< elements from one row to the next, top_k or more */
  int64_t score_stride;
  int32_t slots;          /**< 1: indices are slots of the cache, page * page_size + offset */
  const int32_t* offsets; /**< [T], or null: added to the positions of each query */
  size_t offset_count;
} misa_selection;

/** workspace is aligned to 64 bytes and has at least misa_plan_workspace_bytes bytes. One plan may
 * run in several threads at once, each with its own workspace. */
misa_status misa_run_ragged(const misa_plan* plan, const misa_queries* q, const misa_weights* w,
                            const misa_ragged_keys* k, const misa_selection* out, void* workspace,
                            size_t workspace_bytes) MISA_NOEXCEPT;
misa_status misa_run_paged(const misa_plan* plan, const misa_queries* q, const misa_weights* w,
                           const misa_paged_keys* k, const misa_selection* out, void* workspace,
                           size_t workspace_bytes) MISA_NOEXCEPT;

/* Routing and the block filter from given block means */

typedef struct misa_ragged_means {
  const float* data; /**< [M, D] */
  int64_t count;     /**< M */
  int64_t dim;
  int64_t row_stride;
  const int32_t* starts; /**< [T] */
  size_t start_count;
  const int32_t* ends; /**< [T] */
  size_t end_count;
  const int32_t* partial; /**< [T], or null: no query has a partial block */
  size_t partial_count;
} misa_ragged_means;

/** The heads that the pooled router chooses: out [T, heads]; out_count = T * heads. */
misa_status misa_route_from_means(const misa_context* context, const misa_queries* q,
                                  const misa_weights* w, const misa_ragged_means* means,
                                  int32_t heads, int32_t* out, size_t out_count) MISA_NOEXCEPT;

/** The blocks that the block filter keeps: out [T, filter_blocks]; out_count = T * filter_blocks.
 */
misa_status misa_keep_blocks_from_means(const misa_context* context, const misa_queries* q,
                                        const misa_weights* w, const misa_ragged_means* means,
                                        int32_t filter_blocks, int32_t* out,
                                        size_t out_count) MISA_NOEXCEPT;

/* The key cache */

typedef struct misa_cache_span {
  uint8_t* data;
  int64_t pages;
  int64_t dim;
  int64_t page_stride;
  float* page_sums;
  int64_t page_size; /**< 32, 64 or 128; 0: 64 */
  int64_t page_sums_stride;
  float* largest_scales;
  int64_t largest_scales_stride;
  uint8_t* sketch;
  int32_t sketch_bits; /**< 0, 2 or 4 */
  int64_t sketch_stride;
} misa_cache_span;

typedef struct misa_new_keys {
  const void* data; /**< k [N, D], f32 or bf16 */
  int32_t dtype;
  int64_t tokens;
  int64_t dim;
  int64_t token_stride;
} misa_new_keys;

misa_status misa_cache_bytes(int64_t pages, int64_t dim, int64_t page_size,
                             int64_t* bytes) MISA_NOEXCEPT;

/** Where a page that carries its derived data has them, in bytes from its start. */
typedef struct misa_page_tail {
  int64_t page_sums;
  int64_t largest_scales;
  int64_t sketch;
  int64_t page_stride; /**< the least page stride, a multiple of 128 */
} misa_page_tail;

/** sketch_bits: 0, 2 or 4 bits an element. */
misa_status misa_cache_page_tail(int64_t dim, int64_t page_size, int32_t sketch_bits,
                                 misa_page_tail* tail) MISA_NOEXCEPT;

/** Quantises one key [dim] to out [dim] and its scale. */
misa_status misa_cache_quantize(const float* key, size_t dim, int32_t scale_format, uint8_t* out,
                                float* scale) MISA_NOEXCEPT;

misa_status misa_cache_append(const misa_cache_span* cache, const misa_new_keys* keys,
                              const int64_t* slots, size_t slot_count,
                              int32_t scale_format) MISA_NOEXCEPT;

/** from [count] and to [count] are page numbers. */
misa_status misa_cache_copy_pages(const misa_cache_view* source, const int32_t* from,
                                  const misa_cache_span* target, const int32_t* to,
                                  size_t count) MISA_NOEXCEPT;

/** filled [count], or null: all tokens of every page count. */
misa_status misa_cache_rebuild(const misa_cache_span* cache, const int32_t* pages,
                               const int32_t* filled, size_t count) MISA_NOEXCEPT;

/** k [tokens, D] and scale [tokens]. */
misa_status misa_cache_gather(const misa_cache_view* cache, const int32_t* block_table,
                              size_t block_table_count, int64_t tokens, uint8_t* k,
                              float* scale) MISA_NOEXCEPT;

/* Device memory. Every array given to these functions, those in structs included, is in the memory
 * of the current CUDA device, and `stream` is a cudaStream_t. They run in order on the stream and
 * return at once: they neither synchronise nor allocate, and may be captured into a graph
 * (misa/cuda.hpp). A library without CUDA returns MISA_UNSUPPORTED. */

typedef struct misa_cuda_plan_options {
  int64_t total_keys;   /**< L: the most keys of one call, if ragged */
  int64_t batch;        /**< the most sequences of one call on paged keys; 0: keys are ragged */
  size_t workspace_cap; /**< limit of the workspace, bytes; 0: misa_default_workspace_cap() */
  const char* backend;  /**< "auto", "cuda" or a CUDA backend's own name; null: "auto" */
  int32_t max_sms;      /**< for how many SMs the work of a call is cut; 0: all */
} misa_cuda_plan_options;

typedef struct misa_cuda_plan misa_cuda_plan;

/** The configuration is copied, its static heads included. Loads all kernels of the library, so
 * that any call may be captured from then on. Not itself to be captured. */
misa_status misa_cuda_plan_create(const misa_config* config, const misa_shape* shape,
                                  const misa_cuda_plan_options* options,
                                  misa_cuda_plan** plan) MISA_NOEXCEPT;

/** Null is ignored. */
void misa_cuda_plan_destroy(misa_cuda_plan* plan) MISA_NOEXCEPT;

/** Bytes of device memory that a run needs, at most the cap. */
misa_status misa_cuda_plan_workspace_bytes(const misa_cuda_plan* plan, size_t* bytes) MISA_NOEXCEPT;

/** workspace is aligned to 256 bytes and has at least misa_cuda_plan_workspace_bytes bytes. Runs of
 * several plans on one stream may share it. */
misa_status misa_cuda_run_ragged(const misa_cuda_plan* plan, const misa_queries* q,
                                 const misa_weights* w, const misa_ragged_keys* k,
                                 const misa_selection* out, void* workspace, size_t workspace_bytes,
                                 void* stream) MISA_NOEXCEPT;
misa_status misa_cuda_run_paged(const misa_cuda_plan* plan, const misa_queries* q,
                                const misa_weights* w, const misa_paged_keys* k,
                                const misa_selection* out, void* workspace, size_t workspace_bytes,
                                void* stream) MISA_NOEXCEPT;

typedef struct misa_cuda_logits {
  const float* data; /**< [rows, columns] */
  int64_t rows;
  int64_t columns;
  int64_t row_stride;
  const int32_t* lengths; /**< [rows], or null: every row is `columns` long */
} misa_cuda_logits;

typedef struct misa_cuda_top_k_output {
  int32_t* indices; /**< [rows, top_k] */
  float* scores;    /**< [rows, top_k] or null */
  int64_t index_stride;
  int64_t score_stride;
} misa_cuda_top_k_output;

misa_status misa_cuda_top_k(const misa_cuda_logits* logits, int32_t top_k,
                            const misa_cuda_top_k_output* out, void* stream) MISA_NOEXCEPT;

/** Null keys: an engine has written the bytes and scales of the keys into the slots. */
misa_status misa_cuda_cache_append(const misa_cache_span* cache, const misa_new_keys* keys,
                                   const int64_t* slots, size_t slot_count, int32_t scale_format,
                                   void* stream) MISA_NOEXCEPT;

misa_status misa_cuda_cache_copy_pages(const misa_cache_view* source, const int32_t* from,
                                       const misa_cache_span* target, const int32_t* to,
                                       size_t count, void* stream) MISA_NOEXCEPT;

/** filled [count], or null: all tokens of every page count. */
misa_status misa_cuda_cache_rebuild(const misa_cache_span* cache, const int32_t* pages,
                                    const int32_t* filled, size_t count,
                                    void* stream) MISA_NOEXCEPT;

#ifdef __cplusplus
}
#endif

#endif
