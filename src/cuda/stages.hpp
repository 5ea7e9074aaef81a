// SPDX-License-Identifier: Apache-2.0
// Reports the stages of a call as they are enqueued: as NVTX ranges, and to a listener, with which
// the benchmark of steps records an event between stages.
#pragma once

#include <nvtx3/nvToolsExt.h>

#include <functional>

namespace misa::cuda {

// Called before a stage is enqueued, and with null after the last one.
using StageListener = std::function<void(const char* stage)>;

// Receives the stages of this thread's calls; usually empty.
inline thread_local StageListener stage_listener;

class Stages {
 public:
  Stages() = default;
  ~Stages() { enter(nullptr); }
  Stages(const Stages&) = delete;
  Stages& operator=(const Stages&) = delete;

  // Ends the previous stage and begins this one; null begins none.
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
