// SPDX-License-Identifier: Apache-2.0
// Loading of kernels before they are launched.
#pragma once

namespace misa::cuda {

// A source file with kernels, in a list of all of them. The driver has a module for each.
struct KernelFile {
  // Adds itself to the list, before main or while the library is loaded.
  explicit KernelFile(const void* any_kernel);

  const void* kernel;  // one of the file's kernels
  const KernelFile* next;
};

// Loads every kernel of this library that the current device can run, and returns their number. The
// driver otherwise loads a kernel when it is launched first, which may wait for the device and
// allocate, so that it may fail in a stream that is being captured. Later calls cost little. With a
// driver before CUDA 12.4, which cannot load the kernels of a file unasked, it does nothing and
// returns 0.
int load_kernels();

}  // namespace misa::cuda
