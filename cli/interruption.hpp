// SPDX-License-Identifier: Apache-2.0
// What is removed if a signal ends the process.
#pragma once

#include <csignal>
#include <string>

namespace misa::cli {

// While it lives, signals that would end the process first remove the file that is remembered, then
// end it as they would have. Those that are ignored or handled are left alone. One at a time.
class Interruption {
 public:
  Interruption();
  ~Interruption();  // forgets the file and leaves signals as they were
  Interruption(const Interruption&) = delete;
  Interruption& operator=(const Interruption&) = delete;

  // No signal removes anything while a section lives: what is done to the file, and what is
  // remembered of it, are one step.
  class Section {
   public:
    Section();
    ~Section();
    Section(const Section&) = delete;
    Section& operator=(const Section&) = delete;

    void remember(const std::string& file);  // shorter than PATH_MAX
    void forget();

   private:
    sigset_t blocked_before_;
  };
};

}  // namespace misa::cli
