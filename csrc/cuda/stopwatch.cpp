// SPDX-License-Identifier: Apache-2.0
// CUDA gives times between two events as floats: they are taken from an anchor that moves along, so
// that a training of days stays exact to microseconds.
#include "cuda/stopwatch.h"

#include <algorithm>

namespace hift::cuda {
namespace {

Clock::duration duration_of(double ms) {
  return std::chrono::duration_cast<Clock::duration>(std::chrono::duration<double, std::milli>(ms));
}

}  // namespace

Event Stopwatch::spare() {
  if (spare_.empty()) return Event(device_, Event::Kind::kTime);
  Event event = std::move(spare_.back());
  spare_.pop_back();
  return event;
}

void Stopwatch::begin(cudaStream_t stream, const Interval& what) noexcept {
  begun_.clear();
  try {
    if (anchor_.empty()) {
      Event now = spare();
      now.record(stream);
      anchor_.push_back(std::move(now));
    }
    Stretch stretch{spare(), spare(), what};
    stretch.begin.record(stream);
    begun_.push_back(std::move(stretch));
  } catch (...) {
    cudaGetLastError();
  }
}

void Stopwatch::end(cudaStream_t stream) noexcept {
  if (begun_.empty()) return;
  try {
    begun_.front().end.record(stream);
    stretches_.push_back(std::move(begun_.front()));
  } catch (...) {
    cudaGetLastError();
  }
  begun_.clear();
}

double Stopwatch::take_ms() noexcept {
  try {
    const DeviceGuard guard(device_);
    return told_ms();
  } catch (...) {
    cudaGetLastError();
    return 0;
  }
}

/// Finds the anchor on the host's clock, by an event on a stream without work. The anchor has
/// passed.
void Stopwatch::find_anchor() {
  const Stream idle(device_);
  Event now = spare();
  const auto before = Clock::now();
  now.record(idle.get());
  // Nothing is queued before it: the host waits for the event alone, once.
  now.wait();
  const auto after = Clock::now();
  const double ms = now.ms_since(anchor_.front());
  anchor_at_ = before + (after - before) / 2 - duration_of(ms);
  found_ = true;
  spare_.push_back(std::move(now));
}

double Stopwatch::told_ms() {
  struct Times {
    double begin, end;
    std::size_t of;
  };
  std::vector<Times> done;
  for (const Stretch& s : stretches_) {
    if (!s.end.passed()) break;
    const Event& anchor = anchor_.front();
    done.push_back({s.begin.ms_since(anchor), s.end.ms_since(anchor), done.size()});
  }
  const std::size_t ended = done.size();
  const bool telling = log_ != nullptr && log_->on();
  if (telling && !found_ && ended > 0) find_anchor();
  for (const Times& t : done) {
    if (!telling) break;
    Interval interval = stretches_[t.of].what;
    interval.begin = anchor_at_ + duration_of(t.begin);
    interval.end = anchor_at_ + duration_of(t.end);
    log_->add(interval);
  }
  std::sort(done.begin(), done.end(),
            [](const Times& a, const Times& b) { return a.begin < b.begin; });
  double ms = 0, told = 0;  // from the anchor on
  std::size_t last = ended;
  for (const Times& t : done) {
    if (t.end <= told) continue;
    ms += t.end - std::max(t.begin, told);
    told = t.end;
    last = t.of;
  }
  if (last < ended) {
    std::swap(anchor_.front(), stretches_[last].end);
    anchor_at_ += duration_of(told);
  }
  for (std::size_t i = 0; i < ended; ++i) {
    spare_.push_back(std::move(stretches_.front().begin));
    spare_.push_back(std::move(stretches_.front().end));
    stretches_.pop_front();
  }
  return ms;
}

}  // namespace hift::cuda
