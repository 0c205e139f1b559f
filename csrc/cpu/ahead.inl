// SPDX-License-Identifier: Apache-2.0
// Memory that will be needed is asked for while earlier elements are computed. A processor's own
// prefetching begins anew in every 4 KiB page of each of up to five streams, and a loop does not
// make good what it waits for there.

#pragma once

#include <cstdint>

#include "core/dtype.h"  // HIFT_INLINE

// Everything here is inlined by force: to GCC a function that only asks has no effect, and its
// calls are dropped.
#define HIFT_LAMBDA __attribute__((always_inline))

namespace hift::HIFT_NS {

/// Elements from those in work to those asked for: memory must answer within the time they take.
constexpr std::int64_t kAhead = 256;
/// Elements of a stretch that asks for as many: at least a cache line of every stream.
constexpr std::int64_t kStretch = 64;

/// Asks for the cache lines of `count` elements of `size` bytes that begin `ahead` elements past
/// `values`. They may lie beyond the stream's end: asking for what is not there does nothing.
HIFT_INLINE void ask(const void* values, std::int64_t count, std::int64_t size,
                     std::int64_t ahead = kAhead) {
  const std::uintptr_t first =
      reinterpret_cast<std::uintptr_t>(values) + static_cast<std::uintptr_t>(ahead * size);
  const std::uintptr_t end = first + static_cast<std::uintptr_t>(count * size);
  for (std::uintptr_t line = first; line < end; line += 64) {
    __builtin_prefetch(reinterpret_cast<const void*>(line));
  }
}

/// For a stretch of every stream of a rule with as many states.
template <int kStates, class Param, class Grad, class State>
HIFT_INLINE void ask_stretch(std::int64_t at, const Param* param, const Grad* grad,
                             [[maybe_unused]] const State* state0,
                             [[maybe_unused]] const State* state1,
                             [[maybe_unused]] const State* state2) {
  ask(param + at, kStretch, sizeof(Param));
  ask(grad + at, kStretch, sizeof(Grad));
  if constexpr (kStates > 0) ask(state0 + at, kStretch, sizeof(State));
  if constexpr (kStates > 1) ask(state1 + at, kStretch, sizeof(State));
  if constexpr (kStates > 2) ask(state2 + at, kStretch, sizeof(State));
}

/// Calls `update(from, to)` for the stretches of [begin, end), `ask_ahead(from)` before each whole
/// one. In bursts memory would serve less: that is why stretches are short.
template <class Ask, class Update>
HIFT_INLINE void in_stretches(std::int64_t begin, std::int64_t end, const Ask& ask_ahead,
                              const Update& update) {
  for (; begin + kStretch <= end; begin += kStretch) {
    ask_ahead(begin);
    update(begin, begin + kStretch);
  }
  update(begin, end);
}

}  // namespace hift::HIFT_NS
