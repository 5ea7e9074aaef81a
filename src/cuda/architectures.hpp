// SPDX-License-Identifier: Apache-2.0
// Which devices the compiled kernels run on. CMake's list of architectures is the only one there
// is: what a build says that it can run follows from it.
#pragma once

#include <algorithm>
#include <charconv>
#include <string_view>
#include <vector>

namespace misa::cuda {

// What was compiled for one architecture, as CMake spells it: "90" is machine code and PTX,
// "90-real" machine code alone, "90-virtual" PTX alone. A letter ("90a") says that no other
// architecture runs it.
struct Architecture {
  int capability = 0;  // 10 * major + minor
  bool machine_code = false;
  bool ptx = false;
  bool alone = false;  // for this capability and no other

  // Machine code serves the same major version from its minor version on, PTX every capability from
  // its own on: the driver compiles it.
  [[nodiscard]] bool serves(int device) const {
    if (alone) {
      return device == capability;
    }
    return device >= capability && (ptx || (machine_code && device / 10 == capability / 10));
  }
};

// From a list with commas between.
inline std::vector<Architecture> parse_architectures(std::string_view list) {
  std::vector<Architecture> all;
  while (!list.empty()) {
    const std::string_view item = list.substr(0, list.find(','));
    list.remove_prefix(std::min(list.size(), item.size() + 1));
    Architecture each;
    const char* end = item.data() + item.size();
    const char* rest = std::from_chars(item.data(), end, each.capability).ptr;
    each.alone = rest != end && *rest != '-';
    each.machine_code = !item.ends_with("-virtual");
    each.ptx = !item.ends_with("-real");
    all.push_back(each);
  }
  return all;
}

inline bool any_serves(const std::vector<Architecture>& architectures, int device) {
  return std::any_of(architectures.begin(), architectures.end(),
                     [&](const Architecture& each) { return each.serves(device); });
}

}  // namespace misa::cuda
