// SPDX-License-Identifier: Apache-2.0
// Which devices the compiled kernels run on, from CMake's list of architectures.
#pragma once

#include <algorithm>
#include <charconv>
#include <string_view>
#include <vector>

namespace misa::cuda {

// What was compiled for one architecture, as CMake spells it: "90" is machine code and PTX,
// "90-real" only machine code, "90-virtual" only PTX. Code for an architecture with a letter
// ("90a") runs on no other one.
struct Architecture {
  int capability = 0;  // 10 * major + minor
  bool machine_code = false;
  bool ptx = false;
  bool specific = false;  // runs on this capability only

  // Machine code runs on devices of the same major version and of an equal or higher minor version.
  // PTX, which the driver compiles, runs on every equal or higher capability; but code for less
  // than 9.0 has neither clusters nor waits for the previous kernel, with which kernels are
  // launched on devices from 9.0 on.
  [[nodiscard]] bool serves(int device) const {
    if (specific) {
      return device == capability;
    }
    if (capability < 90 && device >= 90) {
      return false;
    }
    return device >= capability && (ptx || (machine_code && device / 10 == capability / 10));
  }
};

// Parses a list separated by commas.
inline std::vector<Architecture> parse_architectures(std::string_view list) {
  std::vector<Architecture> all;
  while (!list.empty()) {
    const std::string_view item = list.substr(0, list.find(','));
    list.remove_prefix(std::min(list.size(), item.size() + 1));
    Architecture architecture;
    const char* end = item.data() + item.size();
    const char* rest = std::from_chars(item.data(), end, architecture.capability).ptr;
    architecture.specific = rest != end && *rest != '-';
    architecture.machine_code = !item.ends_with("-virtual");
    architecture.ptx = !item.ends_with("-real");
    all.push_back(architecture);
  }
  return all;
}

inline bool any_serves(const std::vector<Architecture>& architectures, int device) {
  return std::any_of(architectures.begin(), architectures.end(),
                     [&](const Architecture& architecture) { return architecture.serves(device); });
}

}  // namespace misa::cuda
