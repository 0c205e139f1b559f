// SPDX-License-Identifier: Apache-2.0
// The simulated runtime's controls for a test in Python, which calls them with ctypes.
#include "memory.h"
#include "sim.h"
#include "streams.h"

#define EXPORT extern "C" __attribute__((visibility("default")))

EXPORT void sim_begin(unsigned seed) {
  hift_sim::Schedule schedule = hift_sim::schedule_of(seed);
  schedule.guarded = false;  // torch's tensors stand for the device's memory
  hift_sim::begin(schedule);
}

/// Memory of the device.
EXPORT void* sim_allocate(std::size_t bytes) {
  void* address = nullptr;
  cudaMalloc(&address, bytes);
  return address;
}

EXPORT void sim_free(void* address) { cudaFree(address); }

EXPORT void* sim_make_stream(int device) {
  cudaStream_t stream = nullptr;
  cudaSetDevice(device);
  cudaStreamCreateWithFlags(&stream, cudaStreamDefault);
  cudaSetDevice(0);
  return stream;
}

EXPORT void sim_wait(void* stream) { cudaStreamSynchronize(static_cast<cudaStream_t>(stream)); }

EXPORT std::int64_t sim_operations() { return hift_sim::stats().operations; }
EXPORT std::int64_t sim_pageable_copies() { return hift_sim::stats().pageable_copies; }
EXPORT std::int64_t sim_registrations() { return hift_sim::stats().registrations; }

EXPORT const char* sim_error() {
  static std::string error;
  error = hift_sim::stats().error;
  return error.c_str();
}
