// SPDX-License-Identifier: Apache-2.0
// Python arrays as the views of the C++ interface, without a copy.
#pragma once

#include <nanobind/nanobind.h>
#include <nanobind/ndarray.h>

#include <cstddef>
#include <cstdint>
#include <optional>
#include <span>
#include <string_view>

#include "core/require.hpp"
#include "misa/misa.hpp"

namespace misa::python {

namespace nb = nanobind;

// Where an array must be: in host memory or on one CUDA device.
struct Place {
  int device = kHost;  // the CUDA device's number, or kHost

  static constexpr int kHost = -1;
  [[nodiscard]] bool host() const { return device == kHost; }
};

enum class Access : bool { read, write };

// Any of f32, bf16 and e4m3; the last two also as their bits, in uint16 and uint8.
inline constexpr std::optional<nb::dlpack::dtype> kElements = std::nullopt;

// An array argument, kept alive during the call. Its last dimension is contiguous.
class Array {
 public:
  // Throws Error unless `object` is an array of this dtype in `place` that allows the access and
  // has as many dimensions as `layout`, e.g. "[T, H, D]", or as one of "[B] or [B, next_n]".
  Array(std::string_view name, nb::handle object, std::optional<nb::dlpack::dtype> dtype,
        std::string_view layout, Place place, Access access = Access::read);

  [[nodiscard]] std::size_t dimensions() const { return array_.ndim(); }
  [[nodiscard]] std::int64_t extent(std::size_t dimension) const {
    return static_cast<std::int64_t>(array_.shape(dimension));
  }
  // Elements from one entry to the next; 0, which means dense in the views, for a single entry.
  [[nodiscard]] std::int64_t stride(std::size_t dimension) const;

  // For an array of kElements only.
  [[nodiscard]] DType dtype() const;
  [[nodiscard]] const void* data() const { return array_.data(); }

  // T is the C++ type of the constructor's dtype.
  template <class T>
  [[nodiscard]] const T* data_of() const {
    return static_cast<const T*>(array_.data());
  }

  // The same, for an array with Access::write only.
  template <class T>
  [[nodiscard]] T* writable_data_of() const {
    return const_cast<T*>(data_of<T>());
  }

  // For a dense array of one dimension only.
  template <class T>
  [[nodiscard]] std::span<const T> span_of() const {
    return {data_of<T>(), static_cast<std::size_t>(extent(0))};
  }

 private:
  std::string_view name_;
  nb::ndarray<nb::ro> array_;
};

// std::nullopt if `object` is None.
std::optional<Array> optional_array(std::string_view name, nb::handle object,
                                    nb::dlpack::dtype dtype, std::string_view layout, Place place,
                                    Access access = Access::read);

// A contiguous array that the call fills; None is an empty one.
class Output {
 public:
  // The default dtype is for a workspace.
  Output(std::string_view name, nb::handle object, Place place,
         nb::dlpack::dtype dtype = nb::dtype<std::uint8_t>());

  // T is the C++ type of the constructor's dtype.
  template <class T>
  [[nodiscard]] std::span<T> span_of() const {
    if (!array_.is_valid()) {
      return {};
    }
    return {static_cast<T*>(array_.data()), array_.size()};
  }

 private:
  nb::ndarray<> array_;
};

// The arrays of a call on contiguous keys.
struct RaggedArrays {
  Array q;
  Array w;
  Array k;
  Array starts;
  Array ends;
  std::optional<Array> scale;

  RaggedArrays(nb::handle q, nb::handle w, nb::handle k, nb::handle ks, nb::handle ke,
               nb::handle k_scale, Place place);

  [[nodiscard]] Queries queries() const;
  [[nodiscard]] Weights weights() const;
  [[nodiscard]] RaggedKeys keys() const;
};

// The arrays of a call on block means.
struct MeansArrays {
  Array q;
  Array w;
  Array rows;
  Array starts;
  Array ends;
  std::optional<Array> partial;

  MeansArrays(nb::handle q, nb::handle w, nb::handle means, nb::handle starts, nb::handle ends,
              nb::handle partial, Place place);

  [[nodiscard]] Queries queries() const;
  [[nodiscard]] Weights weights() const;
  [[nodiscard]] RaggedMeans means() const;
};

// A paged cache, uint8 [pages, page_size, D + 4] or [pages, page_size * (D + 4)], and beside it
// page sums [pages, page_size / 64, D], largest scales [pages, page_size / 64] and sketches uint8
// [pages, bytes], or None.
class CacheArrays {
 public:
  CacheArrays(nb::handle cache, nb::handle page_sums, nb::handle largest_scales,
              nb::handle sketches, Place place, Access access);

  [[nodiscard]] CacheView view() const;
  [[nodiscard]] CacheSpan span() const;  // with Access::write only

 private:
  Array cache_;
  std::optional<Array> sums_;
  std::optional<Array> largest_;
  std::optional<Array> sketch_;
  int sketch_bits_ = 0;
  std::int64_t page_size_;
  std::int64_t dim_;
};

// The arrays of an append; without k, the keys' bytes stand in the cache already.
struct AppendArrays {
  CacheArrays cache;
  std::optional<Array> k;
  Array slots;
  ScaleFormat format;

  AppendArrays(nb::handle cache, nb::handle k, nb::handle slots, std::string_view scale_format,
               nb::handle page_sums, nb::handle largest_scales, nb::handle sketches, Place place);

  [[nodiscard]] NewKeys keys() const;  // with k only
};

// The arrays of a rebuild.
struct RebuildArrays {
  CacheArrays cache;
  Array pages;
  std::optional<Array> filled;

  RebuildArrays(nb::handle cache, nb::handle page_sums, nb::handle pages, nb::handle filled,
                nb::handle largest_scales, nb::handle sketches, Place place);

  [[nodiscard]] std::span<const std::int32_t> counts() const;
};

// The arrays of a copy of pages inside a cache.
struct CopyArrays {
  CacheArrays cache;
  Array from;
  Array to;

  CopyArrays(nb::handle cache, nb::handle from, nb::handle to, nb::handle page_sums,
             nb::handle largest_scales, nb::handle sketches, Place place);
};

// The arrays of a selection on a paged cache. If context_lens has two dimensions, it is
// [B, next_n], or [T, 1] with query_starts: the length of each row.
struct PagedArrays {
  Array q;
  Array w;
  CacheArrays cache;
  Array block_table;
  Array context_lens;
  std::optional<Array> query_starts;
  std::int64_t next_n;

  PagedArrays(nb::handle q, nb::handle w, nb::handle cache, nb::handle block_table,
              nb::handle context_lens, nb::handle query_starts, nb::handle page_sums,
              nb::handle largest_scales, nb::handle sketches, std::int64_t next_n, Place place);

  [[nodiscard]] Queries queries() const;
  [[nodiscard]] Weights weights() const;
  [[nodiscard]] PagedKeys keys() const;
};

// The arrays that a call writes, and in which form.
struct OutputArrays {
  std::optional<Array> indices;
  std::optional<Array> scores;
  Output heads;
  Output residual;
  bool slots;
  std::optional<Array> offsets;

  OutputArrays(nb::handle indices, nb::handle scores, nb::handle heads, nb::handle residual,
               bool slots, nb::handle offsets, Place place);

  [[nodiscard]] Selection selection() const;
};

Queries queries(const Array& q);
Weights weights(const Array& w);

// The type called "f32", "bf16" or "e4m3"; `name` is the argument's name, for the error message.
DType dtype_by_name(std::string_view name, std::string_view dtype);

}  // namespace misa::python
