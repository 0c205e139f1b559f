// SPDX-License-Identifier: Apache-2.0
// A CUDA runtime for tests: streams are queues that run on the host in a random legal order. The
// real headers declare it, so the product's own sources link against it as they are.
#pragma once

#include <cuda_runtime.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <string>

namespace hift_sim {

inline constexpr int kDevices = 2;

/// How the next work to run is chosen.
struct Schedule {
  unsigned seed = 1;
  double eager = 0;         // chance that a call lets one more operation run, again and again
  bool priorities = false;  // streams by a random priority that changes now and then, or all alike
  bool guarded = false;     // device memory can be touched by operations only
};

/// A schedule of each kind in turn, from nothing before a synchronisation to everything at once.
Schedule schedule_of(unsigned seed);

/// Forgets all counts and errors and begins this schedule. Nothing may be queued.
void begin(const Schedule& schedule);

/// The `call`-th call from now on (from 0) that can fail returns cudaErrorUnknown. -1: none does.
void fail_call(std::int64_t call);

struct Stats {
  std::int64_t calls = 0;            // that can fail
  std::int64_t operations = 0;       // that have run
  std::int64_t pageable_copies = 0;  // to or from host memory that is not registered
  std::int64_t device_blocks = 0;    // allocated now
  std::int64_t registrations = 0;    // of host memory, now
  std::int64_t streams = 0;
  std::int64_t events = 0;
  std::string error;        // of the first illegal call or access; empty if there was none
  std::string failed_call;  // name of the call that `fail_call` had fail
};
Stats stats();

/// Queues an operation, as a launch does. `body` runs once, on nobody's stack but its own.
cudaError_t enqueue(cudaStream_t stream, std::function<void()> body, const char* what);

/// A kernel's built-in variables, set for each thread in turn.
uint3 thread_index();
uint3 block_index();
dim3 grid_size();
void run_grid(dim3 grid, dim3 block, const std::function<void()>& thread);

}  // namespace hift_sim
