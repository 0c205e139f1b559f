// SPDX-License-Identifier: Apache-2.0
// How long work on streams took, told by events on those streams: nobody waits for the answer,
// which therefore comes late.
#pragma once

#include <deque>
#include <utility>
#include <vector>

#include "core/intervals.h"
#include "cuda/handles.h"

namespace hift::cuda {

/// Not thread-safe; for streams of one device.
class Stopwatch {
 public:
  explicit Stopwatch(int device) : device_(device) {}

  /// Calls `issue`, which issues work to `stream`, and times that work, which is `what`. Where CUDA
  /// refuses the timing, the work goes untimed.
  template <class Issue>
  void time(cudaStream_t stream, const Interval& what, Issue issue) {
    begin(stream, what);
    issue();
    end(stream);
  }

  /// Milliseconds in which any of the work timed was under way, as far as it is done and was not
  /// told before. Stretches that overlap count once. 0 where CUDA refuses to tell.
  double take_ms() noexcept;

  /// What `take_ms` tells goes to `log` as well, piece by piece.
  void log_to(IntervalLog& log) { log_ = &log; }

 private:
  struct Stretch {
    Event begin, end;
    Interval what;
  };
  void begin(cudaStream_t stream, const Interval& what) noexcept;
  void end(cudaStream_t stream) noexcept;
  Event spare();
  double told_ms();
  void find_anchor();

  std::vector<Stretch> begun_;  // none, or the one whose end is not recorded yet
  int device_;
  std::deque<Stretch> stretches_;  // in the order of issue
  std::vector<Event> spare_;
  std::vector<Event> anchor_;  // none yet, or the point up to which all is told
  IntervalLog* log_ = nullptr;
  bool found_ = false;  // when the anchor was, on the host's clock
  Clock::time_point anchor_at_;
};

}  // namespace hift::cuda
