// SPDX-License-Identifier: Apache-2.0
// The stages of a call, in the order in which they are enqueued: as ranges of a profile (NVTX), and
// to whoever listens, as the benchmark of steps does to stand events between them.
#pragma once

#include <nvtx3/nvToolsExt.h>

#include <functional>

namespace misa::cuda {

// Called before a stage is enqueued, and with null behind the last one.
using StageListener = std::function<void(const char* stage)>;

// The listener of this thread's calls; usually none.
inline thread_local StageListener stage_listener;

class Stages {
 public:
  Stages() = default;
  ~Stages() { enter(nullptr); }
  Stages(const Stages&) = delete;
  Stages& operator=(const Stages&) = delete;

  // Ends the stage before it.
  void enter(const char* stage) {
    if (inside_) {
      nvtxRangePop();
    }
    inside_ = stage != nullptr;
    if (inside_) {
      nvtxRangePushA(stage);
    }
    if (stage_listener) {
      stage_listener(stage);
    }
  }

 private:
  bool inside_ = false;
};

}  // namespace misa::cuda
