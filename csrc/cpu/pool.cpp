// SPDX-License-Identifier: Apache-2.0
// The pool is made at its first use, grows to the largest number of threads asked for, and is never
// destroyed: its threads sleep on a condition variable until the process ends.
#include "cpu/pool.h"

#include <pthread.h>
#include <signal.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <condition_variable>
#include <mutex>
#include <thread>
#include <vector>

namespace hift::cpu {
namespace {

class Pool {
 public:
  void run(std::int64_t count, std::int64_t grain, int threads,
           const std::function<void(std::int64_t, std::int64_t)>& body) {
    const std::lock_guard<std::mutex> turn(turn_);
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < threads - 1) start(workers_);
      fegetenv(&mode_);
      body_ = &body;
      grain_ = grain;
      if (static_cast<int>(parts_.size()) != threads) parts_ = std::vector<Part>(threads);
      const std::int64_t grains = (count + grain - 1) / grain;
      for (int p = 0; p < threads; ++p) {
        parts_[p].next = grains * p / threads * grain;
        parts_[p].end = p + 1 == threads ? count : grains * (p + 1) / threads * grain;
      }
      ++generation_;
    }
    wake_.notify_all();
    share(body, 0);
    std::unique_lock<std::mutex> lock(mutex_);
    // All is taken: who has not woken yet need not, and finds no body.
    body_ = nullptr;
    // `body` and all it refers to live on the caller's stack: nobody may still be in it when this
    // returns.
    done_.wait(lock, [this] { return running_ == 0; });
  }

 private:
  /// A thread's own stretch of elements. What is left of it when the others are done is theirs too.
  struct alignas(64) Part {
    std::atomic<std::int64_t> next{0};
    std::int64_t end = 0;
  };

  /// Takes grains until none is left, its own first: they lie in a row, as memory likes it.
  void share(const std::function<void(std::int64_t, std::int64_t)>& body, int own) {
    const int parts = static_cast<int>(parts_.size());
    for (int p = 0; p < parts; ++p) {
      Part& part = parts_[(own + p) % parts];
      for (;;) {
        const std::int64_t begin = part.next.fetch_add(grain_, std::memory_order_relaxed);
        if (begin >= part.end) break;
        body(begin, begin + grain_ < part.end ? begin + grain_ : part.end);
      }
    }
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
      if (body_ == nullptr || worker + 1 >= static_cast<int>(parts_.size())) continue;
      fesetenv(&mode_);
      const auto* body = body_;
      ++running_;
      lock.unlock();
      share(*body, worker + 1);
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
  std::int64_t grain_ = 1;
  std::vector<Part> parts_;
  int running_ = 0;  // workers inside `body_`
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

void parallel_for(std::int64_t count, std::int64_t grain, int threads,
                  const std::function<void(std::int64_t, std::int64_t)>& body) {
  if (threads <= 1 || count <= grain) {
    if (count > 0) body(0, count);
    return;
  }
  pool().run(count, grain, threads, body);
}

}  // namespace hift::cpu
