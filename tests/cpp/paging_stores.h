// SPDX-License-Identifier: Apache-2.0
// Stores that are wrapped around another to make its timing and its failures a test's business: one
// that stops at a gate, one that dawdles at random, one that fails when told.
#pragma once

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <functional>
#include <mutex>
#include <random>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "core/check.h"
#include "paging/store.h"

namespace hift_test {

using hift::Page;
using hift::PageTable;
using hift::Store;

inline void sleep_ms(double ms) {
  std::this_thread::sleep_for(std::chrono::duration<double, std::milli>(ms));
}

/// Passes everything on.
class WrappedStore : public Store {
 public:
  explicit WrappedStore(Store& inner) : inner_(inner) {}
  void grow(const PageTable& table) override { inner_.grow(table); }
  std::byte* address(const PageTable&, const Page&, int) override { return nullptr; }
  void read(const PageTable& table, const Page& page, std::byte* record) override {
    inner_.read(table, page, record);
  }
  void write(const PageTable& table, const Page& page, const std::byte* record) override {
    inner_.write(table, page, record);
  }
  std::int64_t bytes() const override { return inner_.bytes(); }
  std::string description() const override { return inner_.description(); }

 protected:
  Store& inner_;
};

/// Copies wait at the gate while it is shut, and are noted as they arrive and end.
class GateStore final : public WrappedStore {
 public:
  using Event = std::pair<char, std::int64_t>;  // 'r' or 'w', and 'R' or 'W' at its end; the page

  using WrappedStore::WrappedStore;

  /// Shuts the gate for reads, writes or both.
  void shut(const char* what = "rw") { set(what); }
  void open() { set(""); }

  void read(const PageTable& table, const Page& page, std::byte* record) override {
    pass('r', page.index);
    inner_.read(table, page, record);
    note('R', page.index);
  }
  void write(const PageTable& table, const Page& page, const std::byte* record) override {
    pass('w', page.index);
    inner_.write(table, page, record);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      written_.emplace_back(record, record + table.record_bytes(page));
    }
    note('W', page.index);
  }

  bool seen(char what, std::int64_t page) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return count(what, page) > 0;
  }
  /// Waits for the event, at most seconds: a missing one fails a test instead of hanging it.
  bool comes(char what, std::int64_t page) {
    std::unique_lock<std::mutex> lock(mutex_);
    return changed_.wait_for(lock, std::chrono::seconds(5), [&] { return count(what, page) > 0; });
  }
  /// Whether the event stays away, for as long as it is reasonable to look.
  bool stays_away(char what, std::int64_t page) {
    sleep_ms(25);
    return !seen(what, page);
  }
  int total(char what) {
    const std::lock_guard<std::mutex> lock(mutex_);
    return static_cast<int>(std::count_if(events_.begin(), events_.end(),
                                          [&](const Event& e) { return e.first == what; }));
  }
  /// The records of all writes since the last `take_events`, as they were taken.
  std::vector<std::vector<std::byte>> written() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return written_;
  }
  std::vector<Event> take_events() {
    const std::lock_guard<std::mutex> lock(mutex_);
    written_.clear();
    return std::exchange(events_, {});
  }

 private:
  void set(const char* shut) {
    const std::lock_guard<std::mutex> lock(mutex_);
    shut_ = shut;
    changed_.notify_all();
  }
  void pass(char what, std::int64_t page) {
    std::unique_lock<std::mutex> lock(mutex_);
    events_.emplace_back(what, page);
    changed_.notify_all();
    changed_.wait(lock, [&] { return std::strchr(shut_, what) == nullptr; });
  }
  void note(char what, std::int64_t page) {
    const std::lock_guard<std::mutex> lock(mutex_);
    events_.emplace_back(what, page);
    changed_.notify_all();
  }
  std::int64_t count(char what, std::int64_t page) const {
    return std::count(events_.begin(), events_.end(), Event(what, page));
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  const char* shut_ = "";
  std::vector<Event> events_;
  std::vector<std::vector<std::byte>> written_;
};

/// Runs an action a little later, from another thread; joined at the end of its scope.
class Later {
 public:
  explicit Later(std::function<void()> action, double ms = 40)
      : thread_([action = std::move(action), ms] {
          sleep_ms(ms);
          action();
        }) {}
  ~Later() { thread_.join(); }

 private:
  std::thread thread_;
};

/// Sleeps before and after a copy, up to `max_us` each, and now and then in the middle of it.
class ChaosStore final : public WrappedStore {
 public:
  ChaosStore(Store& inner, unsigned seed, int max_us)
      : WrappedStore(inner), generator_(seed), max_us_(max_us) {}
  void read(const PageTable& table, const Page& page, std::byte* record) override {
    dawdle();
    inner_.read(table, page, record);
    dawdle();
  }
  void write(const PageTable& table, const Page& page, const std::byte* record) override {
    dawdle();
    inner_.write(table, page, record);
    dawdle();
  }

 private:
  void dawdle() {
    int us;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      us = static_cast<int>(generator_() % (max_us_ + 1));
    }
    // Half of them at once: order must hold for the quick as well.
    if (us % 2 == 0) std::this_thread::sleep_for(std::chrono::microseconds(us));
  }
  std::mutex mutex_;
  std::mt19937 generator_;
  unsigned max_us_;
};

/// Fails chosen reads and writes with an errno, leaving half a record behind as a disk might.
class FaultStore final : public WrappedStore {
 public:
  using WrappedStore::WrappedStore;

  /// Copy number `nth` (from 1, counted from now) fails; with `and_after` all after it, too.
  void fail_read(int nth, int error, bool and_after = false) {
    plan(reads_, nth, error, and_after);
  }
  void fail_write(int nth, int error, bool and_after = false) {
    plan(writes_, nth, error, and_after);
  }
  /// Each copy fails with this probability, in thousandths.
  void fail_at_random(int per_mille, unsigned seed) {
    const std::lock_guard<std::mutex> lock(mutex_);
    per_mille_ = per_mille;
    generator_.seed(seed);
  }
  void heal() {
    const std::lock_guard<std::mutex> lock(mutex_);
    reads_ = writes_ = {};
    per_mille_ = 0;
  }
  int failed() const { return failed_; }

  void read(const PageTable& table, const Page& page, std::byte* record) override {
    if (const int error = due(reads_)) {
      std::memset(record, 0xee, static_cast<std::size_t>(table.record_bytes(page) / 2));
      hift::throw_errno(error, "cannot read page ", page.index);
    }
    inner_.read(table, page, record);
  }
  void write(const PageTable& table, const Page& page, const std::byte* record) override {
    if (const int error = due(writes_)) {
      const std::int64_t bytes = table.record_bytes(page);
      hift::Slab torn(bytes);
      std::memset(torn.data(), 0xdd, static_cast<std::size_t>(bytes));
      std::memcpy(torn.data(), record, static_cast<std::size_t>(bytes / 2));
      inner_.write(table, page, torn.data());
      hift::throw_errno(error, "cannot write page ", page.index);
    }
    inner_.write(table, page, record);
  }

 private:
  struct Plan {
    int left = 0, error = 0;
    bool and_after = false;
  };
  void plan(Plan& which, int nth, int error, bool and_after) {
    const std::lock_guard<std::mutex> lock(mutex_);
    which = {nth, error, and_after};
  }
  int due(Plan& which) {
    const std::lock_guard<std::mutex> lock(mutex_);
    int error = 0;
    if (which.error != 0 && (which.left > 0 ? --which.left == 0 : which.and_after)) {
      error = which.error;
    }
    if (static_cast<int>(generator_() % 1000) < per_mille_) error = EIO;
    if (error != 0) ++failed_;
    return error;
  }
  std::mutex mutex_;
  Plan reads_, writes_;
  int per_mille_ = 0;
  std::mt19937 generator_;
  std::atomic<int> failed_{0};
};

}  // namespace hift_test
