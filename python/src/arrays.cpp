// SPDX-License-Identifier: Apache-2.0
#include "arrays.hpp"

#include <string>
#include <type_traits>

#include "core/sketch.hpp"

namespace misa::python {
namespace {

constexpr nb::dlpack::dtype kBfloat16{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Bfloat), 16,
                                      1};
constexpr nb::dlpack::dtype kFloat16{static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float), 16,
                                     1};
constexpr nb::dlpack::dtype kFloat8{
    static_cast<std::uint8_t>(nb::dlpack::dtype_code::Float8_E4M3FN), 8, 1};

std::string name_of(nb::dlpack::dtype dtype) {
  using Code = nb::dlpack::dtype_code;
  std::string kind;
  switch (static_cast<Code>(dtype.code)) {
    case Code::Int: kind = "int"; break;
    case Code::UInt: kind = "uint"; break;
    case Code::Float: kind = "float"; break;
    case Code::Bfloat: kind = "bfloat"; break;
    case Code::Complex: kind = "complex"; break;
    case Code::Bool: return "bool";
    case Code::Float8_E4M3FN: return "float8_e4m3fn";
    case Code::Float8_E4M3FNUZ: return "float8_e4m3fnuz";
    case Code::Float8_E5M2: return "float8_e5m2";
    case Code::Float8_E5M2FNUZ: return "float8_e5m2fnuz";
    case Code::Float8_E8M0FNU: return "float8_e8m0fnu";
    default: return fmt::format("a dtype of DLPack code {}", dtype.code);
  }
  return kind + std::to_string(dtype.bits);
}

constexpr std::string_view kElementNames = "float32, bfloat16 or float8_e4m3fn";

bool holds(nb::dlpack::dtype got, std::optional<nb::dlpack::dtype> expected) {
  return expected ? got == *expected
                  : got == nb::dtype<float>() || got == kBfloat16 || got == kFloat8 ||
                        got == nb::dtype<std::uint16_t>() || got == nb::dtype<std::uint8_t>();
}

std::string name_of(std::optional<nb::dlpack::dtype> expected) {
  return expected ? name_of(*expected) : std::string(kElementNames);
}

std::string name_of(Place place) {
  return place.host() ? "host memory" : fmt::format("CUDA device {}", place.device);
}

template <class Any>
void require_place(std::string_view name, const Any& array, Place place) {
  const int type = array.device_type();
  const bool host = type == nb::device::cpu::value || type == nb::device::cuda_host::value;
  const bool cuda = type == nb::device::cuda::value || type == nb::device::cuda_managed::value;
  const bool there = place.host() ? host : cuda && array.device_id() == place.device;
  require(there, "{}: expected an array in {}, got one in {}", name, name_of(place),
          host   ? name_of(Place{})
          : cuda ? name_of(Place{array.device_id()})
                 : fmt::format("DLPack device type {}", type));
}

std::string text_of(nb::handle object) {
  const std::string text = nb::str(object).c_str();
  return text.starts_with("torch.") ? text.substr(6) : text;
}

// Throws for an object that is not an array, or one that neither DLPack nor the buffer protocol can
// describe (other byte order, sparse, without memory).
[[noreturn]] void refuse(std::string_view name, nb::handle object, const std::string& expected) {
  std::string got = nb::inst_name(object).c_str();
  for (const char* property : {"dtype", "layout", "device"}) {
    if (nb::hasattr(object, property)) {
      got += fmt::format(", {} {}", property, text_of(object.attr(property)));
    }
  }
  const nb::object dtype = nb::getattr(object, "dtype", nb::none());
  const nb::object flags = nb::getattr(object, "flags", nb::none());
  if (text_of(nb::getattr(dtype, "byteorder", nb::none())) == ">") {
    got += ", big-endian";
  }
  if (text_of(nb::getattr(flags, "writeable", nb::none())) == "False") {
    got += ", read-only";
  }
  throw Error(ErrorCode::invalid_argument,
              fmt::format("{}: expected {}, got {}", name, expected, got));
}

// The object as an array, of any framework, after a check of its dtype and place.
template <class Any>
Any cast(std::string_view name, nb::handle object, std::optional<nb::dlpack::dtype> dtype,
         std::string_view layout, Place place) {
  Any array;
  if (!nb::try_cast(object, array)) {
    constexpr std::string_view kind =
        std::is_same_v<Any, nb::ndarray<nb::ro>> ? "an array" : "a writable array";
    refuse(name, object,
           fmt::format("{} of {}{}{} in {}", kind, name_of(dtype), layout.empty() ? "" : " ",
                       layout, name_of(place)));
  }
  require_place(name, array, place);
  const nb::dlpack::dtype got = array.dtype();
  const bool takes_float32 = holds(nb::dtype<float>(), dtype);
  require(holds(got, dtype), "{}: expected {}, got {}{}", name, name_of(dtype),
          nb::hasattr(object, "dtype") ? text_of(object.attr("dtype")) : name_of(got),
          takes_float32 && got == kFloat16 ? "; float32 holds its values exactly" : "");
  return array;
}

// Whether one of the layouts in e.g. "[B] or [B, next_n]" has `ndim` dimensions.
bool has_layout(std::size_t ndim, std::string_view layouts) {
  std::size_t dimensions = 0;
  for (const char c : layouts) {
    if (c == ']' && dimensions == ndim) {
      return true;
    }
    dimensions = c == '[' ? 1 : dimensions + (c == ',' ? 1 : 0);
  }
  return false;
}

}  // namespace

Array::Array(std::string_view name, nb::handle object, std::optional<nb::dlpack::dtype> dtype,
             std::string_view layout, Place place, Access access)
    : name_(name),
      array_(access == Access::read
                 ? cast<nb::ndarray<nb::ro>>(name, object, dtype, layout, place)
                 : nb::ndarray<nb::ro>(cast<nb::ndarray<>>(name, object, dtype, layout, place))) {
  const std::size_t ndim = array_.ndim();
  require(has_layout(ndim, layout), "{}: expected {}, got {} dimensions", name, layout, ndim);
  require(extent(ndim - 1) <= 1 || array_.size() == 0 || array_.stride(ndim - 1) == 1,
          "{}: expected a contiguous last dimension, got a stride of {}", name,
          array_.stride(ndim - 1));
}

std::int64_t Array::stride(std::size_t dimension) const {
  if (extent(dimension) <= 1 || array_.size() == 0) {
    return 0;
  }
  const std::int64_t stride = array_.stride(dimension);
  require(stride > 0, "{}: expected a stride above 0 in dimension {}, got {}", name_, dimension,
          stride);
  return stride;
}

DType Array::dtype() const {
  const nb::dlpack::dtype dtype = array_.dtype();
  if (dtype == nb::dtype<float>()) {
    return DType::f32;
  }
  const bool half = dtype == kBfloat16 || dtype == nb::dtype<std::uint16_t>();
  return half ? DType::bf16 : DType::e4m3;
}

std::optional<Array> optional_array(std::string_view name, nb::handle object,
                                    nb::dlpack::dtype dtype, std::string_view layout, Place place,
                                    Access access) {
  if (object.is_none()) {
    return std::nullopt;
  }
  return Array(name, object, dtype, layout, place, access);
}

Output::Output(std::string_view name, nb::handle object, Place place, nb::dlpack::dtype dtype) {
  if (object.is_none()) {
    return;
  }
  array_ = cast<nb::ndarray<>>(name, object, dtype, "", place);
  std::int64_t dense = 1;
  for (std::size_t i = array_.ndim(); i-- > 0;) {
    require(array_.shape(i) <= 1 || array_.size() == 0 || array_.stride(i) == dense,
            "{}: expected a contiguous array, got a stride of {} in dimension {}", name,
            array_.stride(i), i);
    dense *= static_cast<std::int64_t>(array_.shape(i));
  }
}

RaggedArrays::RaggedArrays(nb::handle q_, nb::handle w_, nb::handle k_, nb::handle ks,
                           nb::handle ke, nb::handle k_scale, Place place)
    : q("q", q_, kElements, "[T, H, D]", place),
      w("w", w_, nb::dtype<float>(), "[T, H]", place),
      k("k", k_, kElements, "[L, D]", place),
      starts("ks", ks, nb::dtype<std::int32_t>(), "[T]", place),
      ends("ke", ke, nb::dtype<std::int32_t>(), "[T]", place),
      scale(optional_array("k_scale", k_scale, nb::dtype<float>(), "[L]", place)) {
  if (scale) {
    require(scale->extent(0) == k.extent(0), "k_scale: expected L = {} entries as k has, got {}",
            k.extent(0), scale->extent(0));
  } else {
    require(k.dtype() != DType::e4m3, "k_scale: expected float32 [L] with e4m3 keys, got none");
  }
}

Queries queries(const Array& q) {
  require(q.extent(1) >= 1 && q.extent(1) <= kMaxHeads, "q: expected H = 1 to {}, got {}",
          kMaxHeads, q.extent(1));
  require(q.extent(2) == 64 || q.extent(2) == 128, "q: expected D = 64 or 128, got {}",
          q.extent(2));
  return {q.data(), q.dtype(), q.extent(0), q.extent(1), q.extent(2), q.stride(0), q.stride(1)};
}

Weights weights(const Array& w) {
  return {w.data_of<float>(), w.extent(0), w.extent(1), w.stride(0)};
}

Queries RaggedArrays::queries() const { return python::queries(q); }
Weights RaggedArrays::weights() const { return python::weights(w); }

RaggedKeys RaggedArrays::keys() const {
  return {k.data(),
          k.dtype(),
          k.extent(0),
          k.extent(1),
          k.stride(0),
          scale ? scale->data_of<float>() : nullptr,
          starts.span_of<std::int32_t>(),
          ends.span_of<std::int32_t>()};
}

MeansArrays::MeansArrays(nb::handle q_, nb::handle w_, nb::handle means, nb::handle starts_,
                         nb::handle ends_, nb::handle partial_, Place place)
    : q("q", q_, kElements, "[T, H, D]", place),
      w("w", w_, nb::dtype<float>(), "[T, H]", place),
      rows("means", means, nb::dtype<float>(), "[M, D]", place),
      starts("starts", starts_, nb::dtype<std::int32_t>(), "[T]", place),
      ends("ends", ends_, nb::dtype<std::int32_t>(), "[T]", place),
      partial(optional_array("partial", partial_, nb::dtype<std::int32_t>(), "[T]", place)) {
  if (partial) {  // the C++ interface reads an empty one as absent
    require(partial->extent(0) == q.extent(0), "partial: expected {} entries (T), got {}",
            q.extent(0), partial->extent(0));
  }
}

Queries MeansArrays::queries() const { return python::queries(q); }
Weights MeansArrays::weights() const { return python::weights(w); }

RaggedMeans MeansArrays::means() const {
  return {rows.data_of<float>(),
          rows.extent(0),
          rows.extent(1),
          rows.stride(0),
          starts.span_of<std::int32_t>(),
          ends.span_of<std::int32_t>(),
          partial ? partial->span_of<std::int32_t>() : std::span<const std::int32_t>{}};
}

namespace {

struct PageShape {
  std::int64_t page_size;
  std::int64_t dim;
};

// The pages of a cache, which must be dense; only the page stride may have padding.
PageShape page_shape(const Array& cache) {
  constexpr std::int64_t kScale = sizeof(float);
  if (cache.dimensions() == 3) {
    // The stride is 0 for an array without elements.
    const std::int64_t apart = cache.stride(1);
    require(apart == 0 || apart == cache.extent(2),
            "cache: expected pages that are dense inside, got tokens {} bytes apart", apart);
    return {cache.extent(1), cache.extent(2) - kScale};
  }
  const std::int64_t bytes = cache.extent(1);
  for (const std::int64_t page_size : {32, 64, 128}) {  // no two pages have as many bytes
    for (const std::int64_t dim : {64, 128}) {
      if (bytes == page_size * (dim + kScale)) {
        return {page_size, dim};
      }
    }
  }
  throw Error(
      ErrorCode::invalid_argument,
      fmt::format("cache: expected pages of page_size * (D + 4) bytes, page_size 32, 64 or 128 and "
                  "D 64 or 128, got {}",
                  bytes));
}

}  // namespace

CacheArrays::CacheArrays(nb::handle cache, nb::handle page_sums, nb::handle largest_scales,
                         nb::handle sketches, Place place, Access access)
    : cache_("cache", cache, nb::dtype<std::uint8_t>(),
             "[pages, page_size, D + 4] or [pages, page_size * (D + 4)]", place, access),
      sums_(optional_array("page_sums", page_sums, nb::dtype<float>(), "[pages, page_size / 64, D]",
                           place, access)),
      largest_(optional_array("largest_scales", largest_scales, nb::dtype<float>(),
                              "[pages, page_size / 64]", place, access)),
      sketch_(optional_array("sketches", sketches, nb::dtype<std::uint8_t>(), "[pages, bytes]",
                             place, access)) {
  const auto [page_size, dim] = page_shape(cache_);
  page_size_ = page_size;
  dim_ = dim;
  const std::int64_t pages = cache_.extent(0);
  const std::int64_t groups = page_size / kGroupSize;
  if (sums_) {
    const std::int64_t apart = sums_->stride(1);
    require(groups > 0, "page_sums: expected none for pages of {} tokens, got an array", page_size);
    require(
        sums_->extent(0) == pages && sums_->extent(1) == groups && sums_->extent(2) == dim &&
            (apart == 0 || apart == dim),
        "page_sums: expected [{}, {}, {}], dense inside a page, got [{}, {}, {}] with groups {} "
        "elements apart",
        pages, groups, dim, sums_->extent(0), sums_->extent(1), sums_->extent(2), apart);
  }
  if (largest_) {
    require(sums_.has_value(), "largest_scales: expected none without page_sums, got an array");
    require(largest_->extent(0) == pages && largest_->extent(1) == groups,
            "largest_scales: expected [{}, {}], got [{}, {}]", pages, groups, largest_->extent(0),
            largest_->extent(1));
  }
  if (sketch_) {
    const std::int64_t two = sketch_page_bytes(2, dim, page_size);
    const std::int64_t four = sketch_page_bytes(4, dim, page_size);
    const std::int64_t bytes = sketch_->extent(1);
    require(sketch_->extent(0) == pages && (bytes == two || bytes == four),
            "sketches: expected [{}, {}] (2 bits) or [{}, {}] (4 bits), got [{}, {}]", pages, two,
            pages, four, sketch_->extent(0), bytes);
    sketch_bits_ = bytes == two ? 2 : 4;
  }
}

CacheView CacheArrays::view() const {
  return {cache_.data_of<std::uint8_t>(),
          cache_.extent(0),
          dim_,
          cache_.stride(0),
          sums_ ? sums_->data_of<float>() : nullptr,
          page_size_,
          sums_ ? sums_->stride(0) : 0,
          largest_ ? largest_->data_of<float>() : nullptr,
          largest_ ? largest_->stride(0) : 0,
          sketch_ ? sketch_->data_of<std::uint8_t>() : nullptr,
          sketch_bits_,
          sketch_ ? sketch_->stride(0) : 0};
}

CacheSpan CacheArrays::span() const {
  return {cache_.writable_data_of<std::uint8_t>(),
          cache_.extent(0),
          dim_,
          cache_.stride(0),
          sums_ ? sums_->writable_data_of<float>() : nullptr,
          page_size_,
          sums_ ? sums_->stride(0) : 0,
          largest_ ? largest_->writable_data_of<float>() : nullptr,
          largest_ ? largest_->stride(0) : 0,
          sketch_ ? sketch_->writable_data_of<std::uint8_t>() : nullptr,
          sketch_bits_,
          sketch_ ? sketch_->stride(0) : 0};
}

PagedArrays::PagedArrays(nb::handle q_, nb::handle w_, nb::handle cache_, nb::handle block_table_,
                         nb::handle context_lens_, nb::handle query_starts_, nb::handle page_sums,
                         nb::handle largest_scales, nb::handle sketches, std::int64_t next_n_,
                         Place place)
    : q("q", q_, kElements, "[T, H, D]", place),
      w("w", w_, nb::dtype<float>(), "[T, H]", place),
      cache(cache_, page_sums, largest_scales, sketches, place, Access::read),
      block_table("block_table", block_table_, nb::dtype<std::int32_t>(), "[B, max_pages]", place),
      context_lens("context_lens", context_lens_, nb::dtype<std::int32_t>(),
                   query_starts_.is_none() ? "[B] or [B, next_n]" : "[B] or [T, 1]", place),
      query_starts(optional_array("query_starts", query_starts_, nb::dtype<std::int32_t>(),
                                  "[B + 1]", place)),
      next_n(next_n_) {
  const bool by_row = context_lens.dimensions() == 2;
  const std::int64_t batch =
      by_row && query_starts ? block_table.extent(0) : context_lens.extent(0);
  require(block_table.extent(0) == batch,
          "block_table: expected B = {} rows as context_lens has, got {}", batch,
          block_table.extent(0));
  if (query_starts) {
    require(query_starts->extent(0) == batch + 1,
            "query_starts: expected B + 1 = {} entries, got {}", batch + 1,
            query_starts->extent(0));
  }
  if (by_row) {
    const std::int64_t rows = query_starts ? q.extent(0) : batch;
    const std::int64_t columns = query_starts ? 1 : next_n;
    require(
        context_lens.extent(0) == rows && context_lens.extent(1) == columns,
        "context_lens: expected [B] or {}, got [{}, {}]",
        query_starts ? fmt::format("[T = {}, 1]", rows) : fmt::format("[B, next_n = {}]", columns),
        context_lens.extent(0), context_lens.extent(1));
    const std::int64_t apart = context_lens.stride(0);
    require(apart == 0 || apart == columns,
            "context_lens: expected a contiguous array, got a stride of {}", apart);
  }
}

Queries PagedArrays::queries() const { return python::queries(q); }
Weights PagedArrays::weights() const { return python::weights(w); }

PagedKeys PagedArrays::keys() const {
  PagedKeys keys{cache.view(), block_table.data_of<std::int32_t>(), block_table.extent(1),
                 block_table.stride(0)};
  if (context_lens.dimensions() == 2) {
    keys.row_lens = {context_lens.data_of<std::int32_t>(),
                     static_cast<std::size_t>(context_lens.extent(0) * context_lens.extent(1))};
  } else {
    keys.context_lens = context_lens.span_of<std::int32_t>();
  }
  keys.next_n = next_n;
  if (query_starts) {
    keys.query_starts = query_starts->span_of<std::int32_t>();
  }
  return keys;
}

OutputArrays::OutputArrays(nb::handle indices_, nb::handle scores_, nb::handle heads_,
                           nb::handle residual_, bool slots_, nb::handle offsets_, Place place)
    : indices(optional_array("indices", indices_, nb::dtype<std::int32_t>(), "[T, top_k]", place,
                             Access::write)),
      scores(optional_array("scores", scores_, nb::dtype<float>(), "[T, top_k]", place,
                            Access::write)),
      heads("heads", heads_, place, nb::dtype<std::int32_t>()),
      residual("residual", residual_, place, nb::dtype<float>()),
      slots(slots_),
      offsets(optional_array("offsets", offsets_, nb::dtype<std::int32_t>(), "[T]", place)) {}

namespace {

// The rows of an output from the first element to the last.
template <class T>
std::span<T> rows_of(const std::optional<Array>& array) {
  if (!array || array->extent(0) == 0) {
    return {};
  }
  const std::int64_t columns = array->extent(1);
  const std::int64_t apart = array->stride(0) != 0 ? array->stride(0) : columns;
  return {array->writable_data_of<T>(),
          static_cast<std::size_t>((array->extent(0) - 1) * apart + columns)};
}

}  // namespace

Selection OutputArrays::selection() const {
  return {rows_of<std::int32_t>(indices),
          rows_of<float>(scores),
          heads.span_of<std::int32_t>(),
          residual.span_of<float>(),
          indices ? indices->stride(0) : 0,
          scores ? scores->stride(0) : 0,
          slots,
          offsets ? offsets->span_of<std::int32_t>() : std::span<const std::int32_t>()};
}

DType dtype_by_name(std::string_view name, std::string_view dtype) {
  for (const DType type : {DType::f32, DType::bf16, DType::e4m3}) {
    if (dtype == misa::name_of(type)) {
      return type;
    }
  }
  throw Error(ErrorCode::invalid_argument,
              fmt::format("{}: expected f32, bf16 or e4m3, got '{}'", name, dtype));
}

}  // namespace misa::python
