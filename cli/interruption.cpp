// SPDX-License-Identifier: Apache-2.0
#include "interruption.hpp"

#include <sched.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <climits>
#include <cstring>

namespace misa::cli {
namespace {

// Global, because a signal handler can access nothing else.
std::atomic_flag locked;
std::array<char, PATH_MAX> name;  // of the file to remove; empty: none
std::array<bool, _NSIG> handled;  // the signals that the current Interruption handles

void lock() {
  while (locked.test_and_set(std::memory_order_acquire)) {
    ::sched_yield();
  }
}

void unlock() { locked.clear(std::memory_order_release); }

// Never unlocks, so that no thread creates or renames the file before the process ends.
extern "C" void remove_and_end(int signal) {
  lock();
  if (name.front() != '\0') {
    ::unlink(name.data());
  }
  std::signal(signal, SIG_DFL);
  std::raise(signal);  // delivered when this handler returns
}

bool is_default(int signal) {
  struct sigaction now {};
  return ::sigaction(signal, nullptr, &now) == 0 && (now.sa_flags & SA_SIGINFO) == 0 &&
         now.sa_handler == SIG_DFL;
}

// Whether the default action of this signal does not end the process.
bool is_harmless(int signal) {
  switch (signal) {
    case SIGCHLD:
    case SIGCONT:
    case SIGTSTP:
    case SIGTTIN:
    case SIGTTOU:
    case SIGURG:
    case SIGWINCH: return true;
    default: return false;
  }
}

}  // namespace

Interruption::Interruption() {
  struct sigaction action {};
  action.sa_handler = remove_and_end;
  sigfillset(&action.sa_mask);  // the handler of a second signal would wait for the lock
  for (int signal = 1; signal < _NSIG; ++signal) {
    // Fails for signals that cannot be handled.
    handled[signal] =
        !is_harmless(signal) && is_default(signal) && ::sigaction(signal, &action, nullptr) == 0;
  }
}

Interruption::~Interruption() {
  Section().forget();
  for (int signal = 1; signal < _NSIG; ++signal) {
    if (handled[signal]) {
      std::signal(signal, SIG_DFL);
    }
  }
}

Interruption::Section::Section() {
  sigset_t all;
  sigfillset(&all);
  ::pthread_sigmask(SIG_SETMASK, &all, &blocked_before_);  // a handler would wait for the lock
  lock();
}

Interruption::Section::~Section() {
  unlock();
  ::pthread_sigmask(SIG_SETMASK, &blocked_before_, nullptr);
}

void Interruption::Section::remember(const std::string& file) {
  std::memcpy(name.data(), file.c_str(), file.size() + 1);
}

void Interruption::Section::forget() { name.front() = '\0'; }

}  // namespace misa::cli
