// SPDX-License-Identifier: Apache-2.0
// Threads, locks and direct I/O do not survive a fork: what holds them belongs to the process that
// made it. A forked child gets an error instead of a hang, and its destructors leave things alone.
#pragma once

#include <unistd.h>

#include "core/check.h"

namespace hift {

class OwnerProcess {
 public:
  bool here() const { return ::getpid() == pid_; }

  /// Throws std::logic_error in any other process; `what` is the subject of the sentence.
  void check(const char* what) const {
    check_order(here(), what, " belongs to process ", pid_,
                " and cannot be used in its forked child ", ::getpid(),
                ": make a new optimizer after the fork");
  }

 private:
  pid_t pid_ = ::getpid();
};

}  // namespace hift
