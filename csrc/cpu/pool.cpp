// SPDX-License-Identifier: Apache-2.0
// The pool is made at its first use, grows to the largest number of threads asked for, and is never
// destroyed: its threads sleep on a condition variable until the process ends.
#include "cpu/pool.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <thread>

namespace hift::cpu {
namespace {

class Pool {
 public:
  void run(std::int64_t count, int threads,
           const std::function<void(std::int64_t, std::int64_t)>& body) {
    const std::lock_guard<std::mutex> turn(turn_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < threads - 1) start(workers_);
      fegetenv(&mode_);
      body_ = &body;
      count_ = count;
      parts_ = threads;
      running_ = threads - 1;
      ++generation_;
    }
    wake_.notify_all();
    body(0, bound(1));
    std::unique_lock<std::mutex> lock(mutex_);
    // `body` and all it refers to live on the caller's stack: nobody may still be in it when this
    // returns.
    done_.wait(lock, [this] { return running_ == 0; });
    body_ = nullptr;
  }

 private:
  /// First element of part `part`, a multiple of 64 so that two threads never write one cache line
  /// of a float stream.
  std::int64_t bound(int part) const {
    if (part == parts_) return count_;
    const std::int64_t share = (count_ + parts_ - 1) / parts_;
    const std::int64_t rounded = (share + 63) / 64 * 64;
    return rounded * part < count_ ? rounded * part : count_;
  }

  void start(int worker) {
    // Signals belong to the program's own threads.
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    std::thread thread([this, worker] { work(worker); });
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    pthread_setname_np(thread.native_handle(), "hift-step");
    thread.detach();
    ++workers_;
  }

  void work(int worker) {
    std::uint64_t seen = 0;
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [&] { return generation_ != seen; });
      seen = generation_;
      if (worker + 1 >= parts_) continue;
      fesetenv(&mode_);
      const auto* body = body_;
      const std::int64_t begin = bound(worker + 1), end = bound(worker + 2);
      lock.unlock();
      if (begin < end) (*body)(begin, end);
      lock.lock();
      if (--running_ == 0) done_.notify_one();
    }
  }

  std::mutex turn_;   // one parallel_for at a time
  std::mutex mutex_;  // guards everything below
  std::condition_variable wake_, done_;
  int workers_ = 0;
  std::uint64_t generation_ = 0;
  fenv_t mode_{};
  const std::function<void(std::int64_t, std::int64_t)>* body_ = nullptr;
  std::int64_t count_ = 0;
  int parts_ = 1;
  int running_ = 0;
};

/// The pool of this process. A forked child has none of the parent's threads, and perhaps its locks
/// held: it leaves that pool alone and makes another.
Pool& pool() {
  static std::mutex mutex;
  static Pool* current = nullptr;
  static const int registered = pthread_atfork([] { mutex.lock(); }, [] { mutex.unlock(); },
                                               [] {
                                                 current = nullptr;
                                                 mutex.unlock();
                                               });
  (void)registered;
  const std::lock_guard<std::mutex> lock(mutex);
  if (current == nullptr) current = new Pool;
  return *current;
}

}  // namespace

void parallel_for(std::int64_t count, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body) {
  if (threads <= 1) {
    if (count > 0) body(0, count);
    return;
  }
  pool().run(count, threads, body);
}

}  // namespace hift::cpu
