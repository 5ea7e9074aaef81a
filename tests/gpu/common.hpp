// SPDX-License-Identifier: Apache-2.0
// What the tests of devices share: every test runs for every CUDA backend of this build, and is
// skipped where no device can run it.
#pragma once

#include <algorithm>
#include <string>
#include <vector>

#include "indexers/common.hpp"

namespace misa::test {

inline std::vector<std::string> cuda_backends_of_this_build() {
  std::vector<std::string> names;
  for (const BackendInfo& backend : backends()) {
    if (backend.name.starts_with("cuda-")) {
      names.push_back(backend.name);
    }
  }
  return names;
}

class EachCudaBackend : public EachBackend {
 protected:
  void SetUp() override {
    const auto available = available_backends();
    if (std::find(available.begin(), available.end(), GetParam()) == available.end()) {
      GTEST_SKIP() << "no device here can run " << GetParam();
    }
  }
};

}  // namespace misa::test
