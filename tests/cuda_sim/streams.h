// SPDX-License-Identifier: Apache-2.0
// The queues behind the simulated runtime: what waits for what, and which operation runs next. One
// lock guards everything; an operation runs under it, on whichever thread asked for progress.
#pragma once

#include <cstdint>
#include <deque>
#include <functional>
#include <memory>
#include <mutex>
#include <vector>

#include "host_warp.h"
#include "sim.h"

namespace hift_sim {

/// One `cudaEventRecord`: later records of the same event do not change what an earlier wait means.
struct Mark {
  bool passed = false;
  double tick = 0;
};

struct Operation {
  enum class Kind { kRun, kRecord, kWait };
  Kind kind = Kind::kRun;
  std::function<void()> body;
  std::shared_ptr<Mark> mark;
  const char* what = "";
  const std::byte* host = nullptr;  // range on the host that it touches
  std::size_t host_bytes = 0;
};

}  // namespace hift_sim

struct CUstream_st {
  std::deque<std::unique_ptr<hift_sim::Operation>> queue;
  int device = 0;
  bool blocking = true;    // waits for the legacy default stream, and that for it
  bool destroyed = false;  // what is queued still runs
  unsigned priority = 0;
  void* fiber = nullptr;  // ThreadSanitizer's context of the stream, and where it stands then
  std::vector<char> stack;
  std::unique_ptr<hift_warp::Warp> warp;
};

struct CUevent_st {
  std::shared_ptr<hift_sim::Mark> mark;
  int device = 0;
  bool timed = true;
};

namespace hift_sim {

std::recursive_mutex& lock();
int& current_device();  // of the calling thread

CUstream_st* resolve(cudaStream_t stream);  // null: the current device's legacy stream
void add_stream(CUstream_st* stream);
void remove_stream(CUstream_st* stream);  // once its queue is empty
std::vector<CUstream_st*> all_streams();

void push(CUstream_st* stream, Operation operation);
std::shared_ptr<Mark> record(CUstream_st* stream);
void hold(CUstream_st* stream, const std::shared_ptr<Mark>& mark);

/// Runs operations until `done`. If none can go on the program ends: waits name what was issued
/// before them, so that cannot be unless an operation was lost.
void run_until(const std::function<bool()>& done, const char* what);
void progress();                 // as many operations as the schedule likes
bool run_one();                  // one, of any stream that can go on
void acquire(const void* what);  // happens-before, for ThreadSanitizer
void release(const void* what);

/// Notes an illegal call. The first one is kept.
void illegal(const std::string& what);

/// Counts a call that can fail. Returns whether it is to fail now; which one that was is kept.
bool to_fail(const char* call);

void open_device_memory(bool open);  // where it is guarded
bool guarded();

}  // namespace hift_sim
