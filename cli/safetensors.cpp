// SPDX-License-Identifier: Apache-2.0
#include "safetensors.hpp"

#include <fcntl.h>
#include <fmt/format.h>
#include <fmt/ranges.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <limits>
#include <nlohmann/json.hpp>
#include <set>
#include <system_error>
#include <utility>

#include "bad_input.hpp"
#include "misa/error.hpp"

namespace misa::cli {
namespace {

using nlohmann::json;

// The format's limit on the header.
constexpr std::uint64_t kMaxHeaderBytes = 100'000'000;
constexpr std::uint64_t kLengthBytes = 8;

struct Dtype {
  std::string_view name;
  std::uint64_t bits;  // per element; elements are packed
};
constexpr Dtype kDtypes[] = {{"BOOL", 8},    {"F4", 4},          {"F6_E2M3", 6},     {"F6_E3M2", 6},
                             {"U8", 8},      {"I8", 8},          {"F8_E5M2", 8},     {"F8_E4M3", 8},
                             {"F8_E8M0", 8}, {"F8_E4M3FNUZ", 8}, {"F8_E5M2FNUZ", 8}, {"I16", 16},
                             {"U16", 16},    {"F16", 16},        {"BF16", 16},       {"I32", 32},
                             {"U32", 32},    {"F32", 32},        {"C64", 64},        {"F64", 64},
                             {"I64", 64},    {"U64", 64}};

// Bits per element; 0 for an unknown name.
std::uint64_t dtype_bits(std::string_view name) {
  for (const Dtype& dtype : kDtypes) {
    if (dtype.name == name) {
      return dtype.bits;
    }
  }
  return 0;
}

constexpr std::string_view kMetadata = "__metadata__";
constexpr std::array<std::string_view, 3> kMembers{"dtype", "shape", "data_offsets"};

// Refuses excessive nesting, and repeated names of tensors or of their members, which the parsed
// header would no longer show.
class HeaderGuard : public nlohmann::json_sax<json> {
 public:
  bool null() override { return true; }
  bool boolean(bool) override { return true; }
  bool number_integer(number_integer_t) override { return true; }
  bool number_unsigned(number_unsigned_t) override { return true; }
  bool number_float(number_float_t, const string_t&) override { return true; }
  bool string(string_t&) override { return true; }
  bool binary(binary_t&) override { return true; }
  bool start_object(std::size_t) override { return open(); }
  bool end_object() override { return close(); }
  bool start_array(std::size_t) override { return open(); }
  bool end_array() override { return close(); }

  bool key(string_t& name) override {
    if (depth_ == 1) {
      in_metadata_ = name == kMetadata;
      check_new(names_, name);
      members_.clear();
    } else if (depth_ == 2 && !in_metadata_ &&
               std::find(kMembers.begin(), kMembers.end(), name) != kMembers.end()) {
      check_new(members_, name);
    }
    return true;
  }

  bool parse_error(std::size_t, const std::string&, const json::exception& error) override {
    const std::string_view what = error.what();  // "[json.exception.parse_error.101] parse error …"
    fail("header: {}", what.substr(what.find("] ") + 2));
  }

 private:
  bool open() {
    constexpr int kDeepest = 127;  // the limit of the format's own reader
    if (++depth_ > kDeepest) {
      fail("header: expected nesting of {} levels at most, got more", kDeepest);
    }
    return true;
  }

  bool close() {
    --depth_;
    return true;
  }

  static void check_new(std::set<std::string>& seen, const std::string& name) {
    if (!seen.insert(name).second) {
      fail("header: expected each name once, got '{}' again", name);
    }
  }

  int depth_ = 0;
  bool in_metadata_ = false;
  std::set<std::string> names_;    // of the header
  std::set<std::string> members_;  // of the tensor that is being read
};

json parse_header(const std::string& text) {
  if (text.empty() || text.front() != '{') {
    fail("header: expected a JSON object that starts with '{{'");
  }
  // The parser would read a zero byte as the end of the text.
  if (text.find('\0') != std::string::npos) {
    fail("header: expected a JSON object, got a zero byte");
  }
  HeaderGuard guard;
  json::sax_parse(text, &guard);
  return json::parse(text);
}

const json& member(const json& object, std::string_view name, const char* key) {
  const auto found = object.find(key);
  if (found == object.end()) {
    fail("tensor '{}': expected '{}', got none", name, key);
  }
  return *found;
}

std::uint64_t size_from(const json& value, std::string_view name, std::string_view what) {
  constexpr std::uint64_t kMost = std::numeric_limits<std::int64_t>::max();
  if (!value.is_number_unsigned() || value.get<std::uint64_t>() > kMost) {
    fail("tensor '{}': expected {} of whole numbers from 0 to 2^63 - 1, got {}", name, what,
         value.dump());
  }
  return value.get<std::uint64_t>();
}

TensorInfo parse_tensor(const std::string& name, const json& entry) {
  if (!entry.is_object()) {
    fail("tensor '{}': expected an object of dtype, shape and data_offsets, got {}", name,
         entry.type_name());
  }
  const json& dtype = member(entry, name, "dtype");
  const json& shape = member(entry, name, "shape");
  const json& offsets = member(entry, name, "data_offsets");
  if (!dtype.is_string() || dtype_bits(dtype.get_ref<const std::string&>()) == 0) {
    std::vector<std::string_view> names;
    for (const Dtype& known : kDtypes) {
      names.push_back(known.name);
    }
    fail("tensor '{}': expected a dtype of {}, got {}", name, fmt::join(names, ", "), dtype.dump());
  }
  if (!shape.is_array() || !offsets.is_array() || offsets.size() != 2) {
    fail("tensor '{}': expected a shape list and two data_offsets, got {} and {}", name,
         shape.dump(), offsets.dump());
  }
  std::vector<std::int64_t> sizes;
  for (const json& size : shape) {
    sizes.push_back(static_cast<std::int64_t>(size_from(size, name, "a shape")));
  }
  TensorInfo tensor = tensor_info(name, dtype.get<std::string>(), std::move(sizes));
  tensor.offset = size_from(offsets[0], name, "data_offsets");
  const std::uint64_t end = size_from(offsets[1], name, "data_offsets");
  if (end < tensor.offset || end - tensor.offset != tensor.bytes) {
    fail("tensor '{}': expected data_offsets {} bytes apart as {} takes, got {} and {}", name,
         tensor.bytes, describe(tensor.dtype, tensor.shape), tensor.offset, end);
  }
  return tensor;
}

Metadata parse_metadata(const json& entry) {
  Metadata metadata;
  if (entry.is_null()) {
    return metadata;
  }
  if (!entry.is_object()) {
    fail("__metadata__: expected an object of strings, got {}", entry.type_name());
  }
  for (const auto& [key, value] : entry.items()) {
    if (!value.is_string()) {
      fail("__metadata__: expected a string for '{}', got {}", key, value.type_name());
    }
    metadata[key] = value.get<std::string>();
  }
  return metadata;
}

// Checks that the tensors, sorted by offset, cover the data exactly.
void check_cover(const std::vector<TensorInfo>& tensors, std::uint64_t data_bytes) {
  std::uint64_t end = 0;
  for (const TensorInfo& tensor : tensors) {
    if (tensor.offset != end) {
      fail("tensor '{}': expected data from byte {}, where the one before it ends, got {}",
           tensor.name, end, tensor.offset);
    }
    end += tensor.bytes;
    if (end > data_bytes) {
      fail("tensor '{}': expected data inside of the file's {} bytes, got an end of {}",
           tensor.name, data_bytes, end);
    }
  }
  if (end != data_bytes) {
    fail("header: expected tensors that fill the file's {} bytes of data, got {}", data_bytes, end);
  }
}

// Bytes as ASCII characters, or by their numbers.
std::string printable(std::span<const std::byte> bytes) {
  std::string text;
  for (const std::byte byte : bytes) {
    const auto c = std::to_integer<unsigned char>(byte);
    text +=
        c >= 0x20 && c < 0x7f ? std::string(1, static_cast<char>(c)) : fmt::format("\\x{:02x}", c);
  }
  return text;
}

int open_file(const std::string& path) {
  // O_NONBLOCK, so that opening a pipe does not wait; it is refused later.
  const int descriptor = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (descriptor < 0) {
    throw Error(ErrorCode::io, fmt::format("{}: cannot be read: {}", path,
                                           std::generic_category().message(errno)));
  }
  return descriptor;
}

}  // namespace

std::string describe(std::string_view dtype, std::span<const std::int64_t> shape) {
  return fmt::format("{} [{}]", dtype, fmt::join(shape, ", "));
}

TensorInfo tensor_info(std::string name, std::string dtype, std::vector<std::int64_t> shape) {
  std::uint64_t elements = 1;
  bool overflow = false;
  for (const std::int64_t size : shape) {
    overflow |= __builtin_mul_overflow(elements, static_cast<std::uint64_t>(size), &elements);
  }
  // Eight elements have as many bytes as one element has bits.
  const std::uint64_t bits = dtype_bits(dtype);
  const std::uint64_t rest = elements % 8 * bits;
  std::uint64_t bytes = 0;
  overflow |= __builtin_mul_overflow(elements / 8, bits, &bytes);
  overflow |= __builtin_add_overflow(bytes, rest / 8, &bytes);
  if (overflow) {
    fail("tensor '{}': expected a size below 2^64 bytes, got {}", name, describe(dtype, shape));
  }
  if (rest % 8 != 0) {
    fail("tensor '{}': expected whole bytes, got {} of {} bits an element", name,
         describe(dtype, shape), bits);
  }
  return {std::move(name), std::move(dtype), std::move(shape), 0, bytes};
}

SafetensorsReader::SafetensorsReader(const std::string& path)
    : SafetensorsReader(path, open_file(path)) {
  try {
    read_header();
  } catch (const Error& error) {
    throw Error(error.code(), fmt::format("{}: {}", path, error.what()));
  }
}

SafetensorsReader::SafetensorsReader(std::string path, int descriptor)
    : path_(std::move(path)), descriptor_(descriptor) {}

SafetensorsReader::~SafetensorsReader() { ::close(descriptor_); }

void SafetensorsReader::read_header() {
  struct stat status {};
  if (::fstat(descriptor_, &status) != 0 || !S_ISREG(status.st_mode)) {
    fail("expected a regular file");
  }
  file_bytes_ = static_cast<std::uint64_t>(status.st_size);
  if (file_bytes_ < kLengthBytes) {
    fail("expected a safetensors file, of {} bytes or more, got {}", kLengthBytes, file_bytes_);
  }
  std::array<std::byte, kLengthBytes> raw{};
  read_at(0, raw);
  std::uint64_t length = 0;  // little-endian
  for (std::size_t i = 0; i < raw.size(); ++i) {
    length |= std::to_integer<std::uint64_t>(raw[i]) << (8 * i);
  }
  const std::uint64_t most = std::min(kMaxHeaderBytes, file_bytes_ - kLengthBytes);
  if (length > most) {
    std::array<std::byte, 1> first{};
    read_at(kLengthBytes, std::span(first).first(std::min<std::size_t>(1, most)));
    if (first[0] != std::byte{'{'}) {
      fail("expected a safetensors file, got one that begins with '{}'", printable(raw));
    }
    fail("header: expected {} bytes at most (file of {}), got a length of {}", most, file_bytes_,
         length);
  }
  std::string text(length, '\0');
  read_at(kLengthBytes, std::as_writable_bytes(std::span(text)));
  const json header = parse_header(text);
  for (const auto& [name, entry] : header.items()) {
    if (name == kMetadata) {
      metadata_ = parse_metadata(entry);
    } else {
      tensors_.push_back(parse_tensor(name, entry));
    }
  }
  // Of two tensors with the same offset, the empty one comes first.
  std::sort(tensors_.begin(), tensors_.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return std::pair(a.offset, a.bytes) < std::pair(b.offset, b.bytes);
  });
  data_begin_ = kLengthBytes + length;
  check_cover(tensors_, file_bytes_ - data_begin_);
}

const TensorInfo* SafetensorsReader::find(std::string_view name) const {
  const auto found = std::find_if(tensors_.begin(), tensors_.end(),
                                  [&](const TensorInfo& tensor) { return tensor.name == name; });
  return found == tensors_.end() ? nullptr : &*found;
}

Buffer SafetensorsReader::read(const TensorInfo& tensor) const {
  Buffer data(tensor.bytes);
  read_at(data_begin_ + tensor.offset, data.span());
  return data;
}

void SafetensorsReader::read_at(std::uint64_t offset, std::span<std::byte> out) const {
  while (!out.empty()) {
    const ssize_t got = ::pread(descriptor_, out.data(), out.size(), static_cast<off_t>(offset));
    if (got < 0 && errno == EINTR) {
      continue;
    }
    if (got <= 0) {  // 0: the file became shorter
      throw Error(ErrorCode::io,
                  fmt::format("{}: cannot be read: {}", path_,
                              got < 0 ? std::generic_category().message(errno) : "it was cut"));
    }
    offset += static_cast<std::uint64_t>(got);
    out = out.subspan(static_cast<std::size_t>(got));
  }
}

SafetensorsWriter::SafetensorsWriter(const std::string& path, std::vector<TensorInfo> tensors,
                                     const Metadata& metadata)
    : file_(path) {
  // The largest element types first, so that every tensor is aligned to its element size.
  std::stable_sort(tensors.begin(), tensors.end(), [](const TensorInfo& a, const TensorInfo& b) {
    return dtype_bits(a.dtype) > dtype_bits(b.dtype);
  });
  nlohmann::ordered_json header;
  if (!metadata.empty()) {
    header[std::string(kMetadata)] = metadata;
  }
  std::uint64_t end = 0;
  for (TensorInfo& tensor : tensors) {
    tensor.offset = end;
    end += tensor.bytes;
    header[tensor.name] = {
        {"dtype", tensor.dtype}, {"shape", tensor.shape}, {"data_offsets", {tensor.offset, end}}};
  }
  std::string text = header.dump();
  text.append((8 - text.size() % 8) % 8, ' ');
  std::array<std::byte, kLengthBytes> length{};
  for (std::size_t i = 0; i < length.size(); ++i) {
    length[i] = static_cast<std::byte>(text.size() >> (8 * i));
  }
  const std::uint64_t data_begin = kLengthBytes + text.size();
  for (const TensorInfo& tensor : tensors) {
    next_[tensor.name] = data_begin + tensor.offset;
  }
  file_bytes_ = data_begin + end;
  file_.reserve(file_bytes_);
  file_.write_at(0, length);
  file_.write_at(kLengthBytes, std::as_bytes(std::span(text)));
}

void SafetensorsWriter::append(std::string_view name, std::span<const std::byte> bytes) {
  std::uint64_t& next = next_.find(name)->second;
  file_.write_at(next, bytes);
  next += bytes.size();
}

}  // namespace misa::cli
