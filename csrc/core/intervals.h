// SPDX-License-Identifier: Apache-2.0
// When each copy, update and wait began and ended: a bounded log that is off until it is asked for.
// Whoever moves or computes writes to it, from any thread; times are of the host's steady clock.
#pragma once

#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <utility>
#include <vector>

#include "core/check.h"

namespace hift {

using Clock = std::chrono::steady_clock;

struct Interval {
  // kIn and kOut: into compute memory and out of it. kRead and kWrite: between a file and the host
  // memory that kIn and kOut copy to and from.
  enum class Kind { kIn, kOut, kUpdate, kWait, kRead, kWrite };

  Kind kind = Kind::kIn;
  int group = -1;  // of the page; none for updates and waits
  std::int64_t page = -1;
  std::int64_t bytes = 0;
  Clock::time_point begin{}, end{};
};

class IntervalLog {
 public:
  /// Keeps at most `most` intervals until they are taken; 0 keeps none and forgets what is there.
  void keep(std::int64_t most) {
    check_argument(most >= 0, "a log of intervals holds 0 or more, not ", most);
    const std::lock_guard<std::mutex> lock(mutex_);
    most_ = static_cast<std::size_t>(most);
    intervals_.clear();
    lost_ = 0;
    on_.store(most > 0, std::memory_order_relaxed);
  }

  /// Whether anybody wants intervals: one load, for those who would have to ask the clock.
  bool on() const { return on_.load(std::memory_order_relaxed); }

  void add(const Interval& interval) {
    const std::lock_guard<std::mutex> lock(mutex_);
    if (most_ == 0) return;
    if (intervals_.size() < most_) {
      intervals_.push_back(interval);
    } else {
      ++lost_;
    }
  }

  /// What there is, in the order in which it was told, and how many found no room.
  std::pair<std::vector<Interval>, std::int64_t> take() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return {std::exchange(intervals_, {}), std::exchange(lost_, 0)};
  }

 private:
  std::atomic<bool> on_{false};
  std::mutex mutex_;
  std::size_t most_ = 0;
  std::int64_t lost_ = 0;
  std::vector<Interval> intervals_;
};

}  // namespace hift
