// SPDX-License-Identifier: Apache-2.0
// Removes an unfinished file if a signal ends the process.
#pragma once

#include <csignal>
#include <string>

namespace misa::cli {

// While an instance exists, a signal that would end the process removes the remembered file first.
// Signals that are ignored or already handled are not changed. At most one instance may exist.
class Interruption {
 public:
  Interruption();
  ~Interruption();  // forgets the file and restores the signals
  Interruption(const Interruption&) = delete;
  Interruption& operator=(const Interruption&) = delete;

  // While a section exists, signals wait, so that a change of the file and of the remembered name
  // is one step for them.
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
