// SPDX-License-Identifier: Apache-2.0
// A warp on the host, in lockstep: its lanes are fibers that stop at every shuffle until all of
// them have come there. Kernels without shuffles run as if this were not here.
#pragma once

#include <ucontext.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

extern "C" {  // there when the program is linked with ThreadSanitizer
void* __tsan_get_current_fiber() __attribute__((weak));
void* __tsan_create_fiber(unsigned) __attribute__((weak));
void __tsan_destroy_fiber(void*) __attribute__((weak));
void __tsan_switch_to_fiber(void*, unsigned) __attribute__((weak));
}

namespace hift_warp {

// ThreadSanitizer notes every call and return on the stack of the fiber that it believes to run. A
// function that changes fibers is called on one and left on another, so it must note neither, or
// both stacks grow until they overflow. Nor does it look at a thread's own variables here.
#define HIFT_UNWATCHED __attribute__((no_sanitize("thread"), noinline))

inline constexpr int kLanes = 32;

[[noreturn]] inline void die(const char* what, int lane) {
  // A GPU would hang or give garbage; a test that is to see this runs in a process of its own.
  std::fprintf(stderr, "host_warp: %s (lane %d)\n", what, lane);
  std::_Exit(4);
}

/// One lane's stack, and what ThreadSanitizer knows of it.
class Fiber {
 public:
  Fiber() : stack_(new char[kStackBytes]) {}
  ~Fiber() {
    if (tsan_ != nullptr) __tsan_destroy_fiber(tsan_);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  void begin(void (*entry)(), ucontext_t* end) {
    if (__tsan_create_fiber != nullptr && tsan_ == nullptr) tsan_ = __tsan_create_fiber(0);
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = end;
    makecontext(&context_, entry, 0);
  }

  HIFT_UNWATCHED void enter(ucontext_t* from) {
    if (tsan_ != nullptr) __tsan_switch_to_fiber(tsan_, 0);
    swapcontext(from, &context_);
  }

  HIFT_UNWATCHED void leave(ucontext_t* to) { swapcontext(&context_, to); }

 private:
  static constexpr std::size_t kStackBytes = std::size_t{1} << 17;
  std::unique_ptr<char[]> stack_;
  ucontext_t context_{};
  void* tsan_ = nullptr;
};

/// The warp that the calling thread runs: the one lent to it, or its own.
class Warp {
 public:
  HIFT_UNWATCHED static Warp& mine() {
    if (lent_ != nullptr) return *lent_;
    static thread_local Warp own;
    return own;
  }

  /// Until `lend(nullptr)`. Who is a thread for ThreadSanitizer, and runs on whichever there is,
  /// brings its own: a warp among another thread's own variables looks like a race to it.
  HIFT_UNWATCHED static void lend(Warp* warp) { lent_ = warp; }

  /// Runs `body` for each lane; `select(lane)` comes before a lane begins or goes on.
  void run(int lanes, const std::function<void(int)>& select, const std::function<void()>& body) {
    // Kernels may launch nothing, so a warp never runs within another.
    select_ = &select;
    body_ = &body;
    host_fiber_ = __tsan_get_current_fiber != nullptr ? __tsan_get_current_fiber() : nullptr;
    start(0);
    if (done_[0]) {  // without a shuffle: the others can do without fibers, too
      for (lane_ = 1; lane_ < lanes; ++lane_) {
        select(lane_);
        body();
      }
      return;
    }
    if (lanes != kLanes) die("a shuffle in a warp that is not full", 0);
    for (int lane = 1; lane < lanes; ++lane) start(lane);
    while (!all_agree()) {
      for (int lane = 0; lane < lanes; ++lane) go_on(lane);
    }
  }

  /// What lane `source` hands over in this shuffle, in which the running lane hands over `value`.
  template <class T>
  T exchange(unsigned mask, const T& value, int source) {
    static_assert(sizeof(T) <= kSlotBytes);
    if (mask != 0xffffffffu) die("a shuffle of some lanes only", lane_);
    if (source < 0 || source >= kLanes) die("a shuffle with a lane that does not exist", lane_);
    if (!in_fiber_) die("a shuffle that the first lane does not take part in", lane_);
    // Two sets of slots: the next shuffle may be reached before all have read this one's.
    unsigned char (*const slots)[kSlotBytes] = slots_[shuffles_[lane_]++ % 2];
    std::memcpy(slots[lane_], &value, sizeof(T));
    to_host();
    T found;
    std::memcpy(&found, slots[source], sizeof(T));
    return found;
  }

  int lane() const { return lane_; }

 private:
  static constexpr std::size_t kSlotBytes = 16;

  HIFT_UNWATCHED static void entry() {
    Warp& warp = mine();
    (*warp.body_)();
    warp.done_[warp.lane_] = true;
    warp.to_host();  // not by uc_link, of which ThreadSanitizer knows nothing
  }

  void start(int lane) {
    done_[lane] = false;
    shuffles_[lane] = 0;
    fibers_[lane].begin(entry, &host_);
    go_on(lane);
  }

  void go_on(int lane) {
    lane_ = lane;
    (*select_)(lane);
    in_fiber_ = true;
    fibers_[lane].enter(&host_);
    in_fiber_ = false;
  }

  HIFT_UNWATCHED void to_host() {
    if (host_fiber_ != nullptr) __tsan_switch_to_fiber(host_fiber_, 0);
    fibers_[lane_].leave(&host_);
  }

  /// Whether all are done. If some are, and others wait for them, the kernel is wrong.
  bool all_agree() const {
    for (int lane = 1; lane < kLanes; ++lane) {
      if (done_[lane] != done_[0]) die("a lane ended while others wait at a shuffle", lane);
    }
    return done_[0];
  }

  inline static thread_local Warp* lent_ = nullptr;

  const std::function<void(int)>* select_ = nullptr;
  const std::function<void()>* body_ = nullptr;
  Fiber fibers_[kLanes];
  ucontext_t host_{};
  void* host_fiber_ = nullptr;
  bool done_[kLanes] = {};
  unsigned shuffles_[kLanes] = {};
  bool in_fiber_ = false;
  int lane_ = 0;
  alignas(16) unsigned char slots_[2][kLanes][kSlotBytes];
};

/// Runs the `threads` threads of a block, warp by warp; `select(thread)` sets threadIdx.
template <class Select, class Body>
void run_block(int threads, const Select& select, const Body& body) {
  for (int first = 0; first < threads; first += kLanes) {
    const int lanes = threads - first < kLanes ? threads - first : kLanes;
    Warp::mine().run(lanes, [&](int lane) { select(first + lane); }, body);
  }
}

}  // namespace hift_warp

// CUDA's own, as far as kernels here use them.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes) {
  hift_warp::Warp& warp = hift_warp::Warp::mine();
  return warp.exchange(mask, value, warp.lane() ^ lanes);
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  return hift_warp::Warp::mine().exchange(mask, value, from);
}
