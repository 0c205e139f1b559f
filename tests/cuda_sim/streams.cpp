// SPDX-License-Identifier: Apache-2.0
// Compiled without ThreadSanitizer even where the rest is not: each stream has a fiber of its own
// there, and only what one operation tells another may order them.
#include "streams.h"

#include <ucontext.h>

#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <random>

#include "host_warp.h"

extern "C" {  // there when the program is linked with ThreadSanitizer
void* __tsan_get_current_fiber() __attribute__((weak));
void* __tsan_create_fiber(unsigned) __attribute__((weak));
void __tsan_destroy_fiber(void*) __attribute__((weak));
void __tsan_switch_to_fiber(void*, unsigned) __attribute__((weak));
void __tsan_set_fiber_name(void*, const char*) __attribute__((weak));
void __tsan_acquire(void*) __attribute__((weak));
void __tsan_release(void*) __attribute__((weak));
}

namespace hift_sim {
namespace {

struct State {
  std::recursive_mutex mutex;
  Schedule schedule;
  std::mt19937 random;
  CUstream_st legacy[kDevices];
  std::vector<CUstream_st*> streams;
  Stats stats;
  std::int64_t fail_at = -1;
  uint3 thread{}, block{};
  dim3 grid;

  State() {
    for (int d = 0; d < kDevices; ++d) legacy[d].device = d;
  }
};

State& state() {
  static State& one = *new State;  // streams may be used until the process ends
  return one;
}

double chance() { return std::uniform_real_distribution<double>()(state().random); }

bool can_go_on(const CUstream_st& stream) {
  if (stream.queue.empty()) return false;
  const Operation& next = *stream.queue.front();
  return next.kind != Operation::Kind::kWait || next.mark->passed;
}

/// Runs `work` for ThreadSanitizer as a thread of the stream's own, on a stack of its own: what its
/// operations did before is before this one, and nothing else is. Elsewhere just runs it.
class Fiber {
 public:
  explicit Fiber(CUstream_st& stream) {
    if (__tsan_create_fiber == nullptr) return;
    if (stream.fiber == nullptr) {
      stream.fiber = __tsan_create_fiber(0);
      __tsan_set_fiber_name(stream.fiber, "stream");
      stream.stack.resize(kStackBytes);
      stream.warp = std::make_unique<hift_warp::Warp>();
      __tsan_release(stream.stack.data());
    }
    stream_ = &stream;
  }

  void run(const std::function<void()>& work) {
    if (stream_ == nullptr) {
      work();
      return;
    }
    ucontext_t context;
    getcontext(&context);
    context.uc_stack.ss_sp = stream_->stack.data();
    context.uc_stack.ss_size = stream_->stack.size();
    context.uc_link = &host_;
    makecontext(&context, begin, 0);
    current_ = &work;
    hift_warp::Warp::lend(stream_->warp.get());
    void* const host = __tsan_get_current_fiber();
    constexpr unsigned kNoSynchronisation = 1;
    __tsan_switch_to_fiber(stream_->fiber, kNoSynchronisation);
    __tsan_acquire(stream_->stack.data());
    swapcontext(&host_, &context);
    __tsan_switch_to_fiber(host, kNoSynchronisation);
    hift_warp::Warp::lend(nullptr);
  }

 private:
  static constexpr std::size_t kStackBytes = std::size_t{1} << 18;
  static void begin() { (*current_)(); }

  static thread_local const std::function<void()>* current_;
  CUstream_st* stream_ = nullptr;
  ucontext_t host_;
};

thread_local const std::function<void()>* Fiber::current_ = nullptr;

}  // namespace

void acquire(const void* what) {
  if (__tsan_acquire != nullptr) __tsan_acquire(const_cast<void*>(what));
}

void release(const void* what) {
  if (__tsan_release != nullptr) __tsan_release(const_cast<void*>(what));
}

std::recursive_mutex& lock() { return state().mutex; }

int& current_device() {
  static thread_local int device = 0;
  return device;
}

CUstream_st* resolve(cudaStream_t stream) {
  if (stream != nullptr && stream != cudaStreamLegacy) return stream;
  return &state().legacy[current_device()];
}

std::vector<CUstream_st*> all_streams() {
  std::vector<CUstream_st*> all = state().streams;
  for (CUstream_st& legacy : state().legacy) all.push_back(&legacy);
  return all;
}

void add_stream(CUstream_st* stream) {
  stream->priority = state().random();
  state().streams.push_back(stream);
  ++state().stats.streams;
}

namespace {

void forget(CUstream_st* stream) {
  auto& streams = state().streams;
  streams.erase(std::find(streams.begin(), streams.end(), stream));
  if (stream->fiber != nullptr) __tsan_destroy_fiber(stream->fiber);
  delete stream;
}

}  // namespace

void remove_stream(CUstream_st* stream) {
  --state().stats.streams;
  stream->destroyed = true;
  if (stream->queue.empty()) forget(stream);
}

namespace {

void push_plain(CUstream_st* stream, Operation operation) {
  auto owned = std::make_unique<Operation>(std::move(operation));
  release(owned.get());  // what the host did before the call
  stream->queue.push_back(std::move(owned));
}

/// The legacy stream and the blocking ones of its device wait for each other at every call.
void join_legacy(CUstream_st* stream) {
  CUstream_st* legacy = &state().legacy[stream->device];
  const auto follow = [](CUstream_st* later, CUstream_st* earlier) {
    if (earlier->queue.empty()) {
      acquire(earlier);
      return;
    }
    auto mark = std::make_shared<Mark>();
    push_plain(earlier, {Operation::Kind::kRecord, {}, mark, "legacy stream", nullptr, 0});
    push_plain(later, {Operation::Kind::kWait, {}, mark, "legacy stream", nullptr, 0});
  };
  if (stream != legacy) {
    if (stream->blocking) follow(stream, legacy);
    return;
  }
  for (CUstream_st* other : state().streams) {
    if (other->blocking && other->device == stream->device) follow(legacy, other);
  }
}

}  // namespace

void push(CUstream_st* stream, Operation operation) {
  join_legacy(stream);
  push_plain(stream, std::move(operation));
}

std::shared_ptr<Mark> record(CUstream_st* stream) {
  auto mark = std::make_shared<Mark>();
  push(stream, {Operation::Kind::kRecord, {}, mark, "event record", nullptr, 0});
  return mark;
}

void hold(CUstream_st* stream, const std::shared_ptr<Mark>& mark) {
  push(stream, {Operation::Kind::kWait, {}, mark, "event wait", nullptr, 0});
}

bool run_one() {
  State& s = state();
  std::vector<CUstream_st*> able;
  for (CUstream_st* stream : all_streams()) {
    if (can_go_on(*stream)) able.push_back(stream);
  }
  if (able.empty()) return false;
  CUstream_st* chosen = able[s.random() % able.size()];
  if (s.schedule.priorities) {
    if (s.random() % 16 == 0) {
      for (CUstream_st* stream : all_streams()) stream->priority = s.random();
    }
    for (CUstream_st* stream : able) {
      if (stream->priority > chosen->priority) chosen = stream;
    }
  }
  std::unique_ptr<Operation> operation = std::move(chosen->queue.front());
  chosen->queue.pop_front();
  ++s.stats.operations;
  Fiber(*chosen).run([&] {
    acquire(operation.get());
    switch (operation->kind) {
      case Operation::Kind::kRun:
        open_device_memory(true);
        operation->body();
        open_device_memory(false);
        break;
      case Operation::Kind::kRecord:
        release(operation->mark.get());
        operation->mark->passed = true;
        operation->mark->tick = static_cast<double>(s.stats.operations);
        break;
      case Operation::Kind::kWait:
        acquire(operation->mark.get());
        break;
    }
    operation.reset();  // what it holds was last used here
    release(chosen);    // for who synchronises with the whole stream
  });
  if (chosen->destroyed && chosen->queue.empty()) forget(chosen);
  return true;
}

void progress() {
  while (chance() < state().schedule.eager && run_one()) {
  }
}

void run_until(const std::function<bool()>& done, const char* what) {
  while (!done()) {
    if (run_one()) continue;
    std::fprintf(stderr, "cuda_sim: deadlock: %s waits for work that can never run\n", what);
    for (CUstream_st* stream : all_streams()) {
      if (stream->queue.empty()) continue;
      std::fprintf(stderr, "cuda_sim: a stream of device %d stands at '%s'\n", stream->device,
                   stream->queue.front()->what);
    }
    std::_Exit(3);
  }
}

void illegal(const std::string& what) {
  if (state().stats.error.empty()) state().stats.error = what;
}

bool to_fail(const char* call) {
  const bool now = state().stats.calls++ == state().fail_at;
  if (now) state().stats.failed_call = call;
  return now;
}

bool guarded() { return state().schedule.guarded; }

// Control -----------------------------------------------------------------------------------------

Schedule schedule_of(unsigned seed) {
  constexpr double kEager[] = {0.0, 0.3, 0.7, 0.95, 1.0};
  return {seed, kEager[seed % 5], seed / 5 % 2 == 1, seed % 64 == 0};
}

void begin(const Schedule& schedule) {
  const std::lock_guard<std::recursive_mutex> guard(lock());
  State& s = state();
  open_device_memory(true);
  s.schedule = schedule;
  s.random.seed(schedule.seed);
  s.fail_at = -1;
  s.stats.calls = s.stats.operations = s.stats.pageable_copies = 0;
  s.stats.error.clear();
  s.stats.failed_call.clear();
  for (CUstream_st* stream : all_streams()) stream->priority = s.random();
  open_device_memory(false);
}

void fail_call(std::int64_t call) {
  const std::lock_guard<std::recursive_mutex> guard(lock());
  state().fail_at = call < 0 ? -1 : state().stats.calls + call;
}

Stats& counts() { return state().stats; }

Stats stats() {
  const std::lock_guard<std::recursive_mutex> guard(lock());
  return state().stats;
}

uint3 thread_index() { return state().thread; }
uint3 block_index() { return state().block; }
dim3 grid_size() { return state().grid; }

void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread) {
  State& s = state();
  s.grid = grid;
  for (unsigned b = 0; b < grid.x; ++b) {
    s.block = {b, 0, 0};
    hift_warp::run_block(
        static_cast<int>(block.x), [&s](int t) { s.thread = {static_cast<unsigned>(t), 0, 0}; },
        thread);
  }
}

}  // namespace hift_sim
