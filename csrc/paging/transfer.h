// SPDX-License-Identifier: Apache-2.0
// A whole transfer out of system calls that may move less than asked or be interrupted. Direct I/O
// goes on at a block's boundary only, so what a short call moved of a block is moved again.
#pragma once

#include <sys/types.h>

#include <cerrno>
#include <cstdint>

namespace hift {

inline constexpr std::int64_t kFileBlock = 4096;

/// Calls `move(done)`, which moves bytes from `done` on and returns their number or -1 with errno,
/// until `bytes` are moved. Returns how many were, short only if a call moved nothing new: then
/// errno is the call's, or 0 if it did not fail.
template <class Move>
std::int64_t transfer(std::int64_t bytes, Move move) {
  std::int64_t done = 0;
  while (done < bytes) {
    const ssize_t moved = move(done);
    if (moved < 0) {
      if (errno == EINTR) continue;
      return done;
    }
    const std::int64_t end = done + moved;
    const std::int64_t next = end >= bytes ? bytes : end / kFileBlock * kFileBlock;
    if (next == done) {
      errno = 0;
      return end;
    }
    done = next;
  }
  return done;
}

}  // namespace hift
