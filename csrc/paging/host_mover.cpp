// SPDX-License-Identifier: Apache-2.0
// One lock over the queue of copies; readers and writers take what may run, copy without the lock,
// and report. Everything a copy touches is handed over under that lock.
#include "paging/host_mover.h"

#include <pthread.h>
#include <signal.h>

#include <chrono>
#include <condition_variable>
#include <mutex>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "core/check.h"
#include "paging/copy_queue.h"

namespace hift {
namespace {

double ms_between(Clock::time_point from, Clock::time_point to) {
  return std::chrono::duration<double, std::milli>(to - from).count();
}

/// Signals blocked in the constructing thread and so in the threads it starts: a handler (Python's,
/// say) must not run on a copying thread. Faults stay open, for whoever reports them.
class BlockedSignals {
 public:
  BlockedSignals() {
    sigset_t all;
    sigfillset(&all);
    for (const int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL, SIGTRAP, SIGABRT, SIGSYS}) {
      sigdelset(&all, fault);
    }
    pthread_sigmask(SIG_BLOCK, &all, &before_);
  }
  ~BlockedSignals() { pthread_sigmask(SIG_SETMASK, &before_, nullptr); }
  BlockedSignals(const BlockedSignals&) = delete;
  BlockedSignals& operator=(const BlockedSignals&) = delete;

 private:
  sigset_t before_;
};

}  // namespace

struct HostMover::State {
  State(Store& store_, const PageTable& table_, int slots, std::int64_t slot_bytes_, Hooks hooks_)
      : store(store_),
        table(table_),
        hooks(std::move(hooks_)),
        slot_bytes(slot_bytes_),
        slab(slots * slot_bytes_),
        queue(slots) {}

  void start(int readers, int writers);
  void stop();
  void work(bool out);
  std::exception_ptr run(const Copy& copy);
  std::byte* address(int slot) { return slab.data() + slot * slot_bytes; }

  Store& store;
  const PageTable& table;
  const Hooks hooks;
  const std::int64_t slot_bytes;
  Slab slab;

  std::mutex mutex;
  CopyQueue queue;
  std::condition_variable work_came[2];  // to readers, to writers
  std::condition_variable copy_ended;    // to the host
  bool stopping = false;
  int running = 0;
  Clock::time_point busy_since;
  double busy_ms = 0;
  IntervalLog* log = nullptr;
  Interval::Kind kinds[2] = {};  // of fetches, of write-backs
  std::vector<std::thread> threads;
};

void HostMover::State::start(int readers, int writers) {
  const BlockedSignals blocked;
  threads.reserve(static_cast<std::size_t>(readers) + writers);
  try {
    for (int i = 0; i < readers + writers; ++i) {
      const bool out = i >= readers;
      threads.emplace_back([this, out] { work(out); });
      const std::string name = text(out ? "hift-write-" : "hift-read-", out ? i - readers : i);
      pthread_setname_np(threads.back().native_handle(), name.substr(0, 15).c_str());
    }
  } catch (...) {
    stop();
    throw;
  }
}

void HostMover::State::stop() {
  {
    const std::lock_guard<std::mutex> lock(mutex);
    stopping = true;
    queue.drop_useless_fetches();
  }
  for (auto& cv : work_came) cv.notify_all();
  for (std::thread& thread : threads) thread.join();
  threads.clear();
}

void HostMover::State::work(bool out) {
  std::unique_lock<std::mutex> lock(mutex);
  for (;;) {
    // A write-back may still be held up by the copy before it, so a stop waits for the last one.
    work_came[out].wait(lock, [&] { return queue.ready(out) || (stopping && queue.idle()); });
    if (!queue.ready(out)) return;
    const CopyQueue::Ticket ticket = queue.take(out);
    const Copy copy = queue.copy(ticket);
    std::exception_ptr error = queue.doomed(ticket);
    if (!error) {
      if (running++ == 0) busy_since = Clock::now();
      IntervalLog* const to = log != nullptr && log->on() ? log : nullptr;
      lock.unlock();
      Interval interval{kinds[out], copy.page.group, copy.page.index,
                        table.record_bytes(copy.page)};
      if (to != nullptr) interval.begin = Clock::now();
      error = run(copy);
      if (to != nullptr) {
        interval.end = Clock::now();
        to->add(interval);
      }
      lock.lock();
      if (--running == 0) busy_ms += ms_between(busy_since, Clock::now());
    }
    queue.finish(ticket, std::move(error));
    // The end of one copy may let one of each direction run, and end the host's wait.
    for (auto& cv : work_came) cv.notify_all();
    copy_ended.notify_all();
  }
}

std::exception_ptr HostMover::State::run(const Copy& copy) {
  try {
    const auto call = [&](const Hooks::Call& hook) {
      if (hook) hook(copy.page, copy.slot);
    };
    if (copy.out) {
      call(hooks.before_write);
      store.write(table, copy.page, address(copy.slot));
    } else {
      call(hooks.before_read);
      store.read(table, copy.page, address(copy.slot));
      call(hooks.after_read);
    }
    return nullptr;
  } catch (...) {
    return std::current_exception();
  }
}

HostMover::HostMover(Store& store, const PageTable& table, int slots, std::int64_t slot_bytes,
                     int readers, int writers, Hooks hooks)
    : table_(table), slots_(slots) {
  check_argument(slots >= 1, "a ring needs at least one slot, not ", slots);
  check_argument(slot_bytes >= 1, "a slot's size must be positive: ", slot_bytes);
  check_argument(readers >= 1 && readers <= 256, "readers must be from 1 to 256: ", readers);
  check_argument(writers >= 1 && writers <= 256, "writers must be from 1 to 256: ", writers);
  slot_bytes_ = (slot_bytes + table.alignment() - 1) / table.alignment() * table.alignment();
  state_ = std::make_unique<State>(store, table, slots, slot_bytes_, std::move(hooks));
  state_->start(readers, writers);
}

void HostMover::stop() {
  if (owner_.here()) state_->stop();
}

HostMover::~HostMover() {
  if (owner_.here()) {
    stop();
  } else {
    // In a forked child the threads do not exist, the lock may be held by one of them for ever, and
    // destroying a condition variable waits for its waiters. What is left of it stays.
    (void)state_.release();
  }
}

void HostMover::check(int slot) const {
  owner_.check("the threads that move pages");
  check_argument(slot >= 0 && slot < slots_, "slot ", slot, " is not one of ", slots_);
}

std::byte* HostMover::slot_address(int slot) {
  check(slot);
  return state_->address(slot);
}

void HostMover::issue(const Page& page, int slot, bool out) {
  check(slot);
  check_argument(table_.record_bytes(page) <= slot_bytes_, "page ", page.index, " has ",
                 table_.record_bytes(page), " bytes; a slot holds ", slot_bytes_);
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->queue.push(page, slot, out);
  }
  state_->work_came[out].notify_one();
}

void HostMover::fetch(const Page& page, int slot) { issue(page, slot, false); }

void HostMover::write_back(const Page& page, int slot, void* /*stream*/) {
  issue(page, slot, true);
}

double HostMover::await(int slot, void* /*stream*/) {
  check(slot);
  const auto start = Clock::now();
  std::unique_lock<std::mutex> lock(state_->mutex);
  // Also for write-backs: the caller is about to change the bytes they read.
  const bool stood = !state_->queue.idle(slot);
  state_->copy_ended.wait(lock, [&] { return state_->queue.idle(slot); });
  if (const auto error = state_->queue.error(slot)) std::rethrow_exception(error);
  if (!stood) return 0;
  const auto end = Clock::now();
  IntervalLog* const log = state_->log;
  if (log != nullptr && log->on()) log->add({Interval::Kind::kWait, -1, -1, 0, start, end});
  return ms_between(start, end);
}

void HostMover::wait(int slot) { await(slot, nullptr); }

void HostMover::retry(int slot) {
  check(slot);
  {
    const std::lock_guard<std::mutex> lock(state_->mutex);
    state_->queue.retry(slot);
  }
  state_->work_came[1].notify_all();
}

bool HostMover::failed(int slot) const {
  check(slot);
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->queue.error(slot) != nullptr;
}

std::int64_t HostMover::unsaved(int slot) const {
  check(slot);
  const std::lock_guard<std::mutex> lock(state_->mutex);
  return state_->queue.unsaved(slot);
}

void HostMover::drain() {
  owner_.check("the threads that move pages");
  std::unique_lock<std::mutex> lock(state_->mutex);
  state_->copy_ended.wait(lock, [&] { return state_->queue.idle(); });
  if (const auto error = state_->queue.first_error()) std::rethrow_exception(error);
}

void HostMover::log_to(IntervalLog& log, Interval::Kind in, Interval::Kind out) {
  const std::lock_guard<std::mutex> lock(state_->mutex);
  state_->log = &log;
  state_->kinds[0] = in;
  state_->kinds[1] = out;
}

double HostMover::take_busy_ms() {
  owner_.check("the threads that move pages");
  const std::lock_guard<std::mutex> lock(state_->mutex);
  double busy = std::exchange(state_->busy_ms, 0);
  if (state_->running > 0) {
    const auto now = Clock::now();
    busy += ms_between(std::exchange(state_->busy_since, now), now);
  }
  return busy;
}

}  // namespace hift
