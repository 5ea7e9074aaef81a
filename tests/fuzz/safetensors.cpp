// SPDX-License-Identifier: Apache-2.0
// Files made of the fuzzer's bytes. The reader must refuse a file or stay inside it (the sanitizers
// check that); the indexers must accept every input that the reader accepts.
#include "safetensors.hpp"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <string>

#include "misa/misa.hpp"
#include "step.hpp"
#include "trace.hpp"

namespace {

// The bytes as a file in memory; each input replaces the previous one.
std::string file_of(const std::uint8_t* data, std::size_t size) {
  static const int descriptor = ::memfd_create("fuzz", 0);
  if (::ftruncate(descriptor, 0) != 0 ||
      ::pwrite(descriptor, data, size, 0) != static_cast<ssize_t>(size)) {
    std::abort();
  }
  return "/proc/self/fd/" + std::to_string(descriptor);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const std::uint8_t* data, std::size_t size) {
  static const misa::Context context({.backend = "reference", .threads = 1});
  const std::string path = file_of(data, size);
  try {
    const misa::cli::SafetensorsReader file(path);
    for (const misa::cli::TensorInfo& tensor : file.tensors()) {
      if (file.read(tensor).size() != tensor.bytes) {
        std::abort();
      }
    }
  } catch (const misa::Error&) {
    return 0;
  }
  try {
    const misa::cli::Trace trace(path);
    try {
      misa::cli::select(context, misa::IndexerConfig::misa(8, 1), trace.inputs());
    } catch (const misa::Error&) {
      std::abort();
    }
  } catch (const misa::Error&) {
  }
  return 0;
}
