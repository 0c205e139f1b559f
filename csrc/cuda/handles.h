// SPDX-License-Identifier: Apache-2.0
// Streams, events and registered host memory as objects that own one CUDA resource each. They move
// and do not copy; their ends report nothing, since a runtime that is being unloaded refuses all.
#pragma once

#include <cstddef>
#include <cstdint>
#include <utility>

#include "cuda/runtime.h"

namespace hift::cuda {

/// A stream of `device` that does not wait for the legacy default stream.
class Stream {
 public:
  explicit Stream(int device) {
    const DeviceGuard guard(device);
    check(cudaStreamCreateWithFlags(&handle_, cudaStreamNonBlocking), "cudaStreamCreateWithFlags",
          "a stream for copies");
  }
  ~Stream() {
    if (handle_ != nullptr) cudaStreamDestroy(handle_);
  }
  Stream(Stream&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Stream& operator=(Stream&&) = delete;

  cudaStream_t get() const { return handle_; }

 private:
  cudaStream_t handle_ = nullptr;
};

/// A point in the work of a stream of `device`. Before the first `record` there is nothing to wait
/// for.
class Event {
 public:
  enum class Kind { kOrder, kTime };

  explicit Event(int device, Kind kind = Kind::kOrder) {
    const DeviceGuard guard(device);
    const unsigned flags = kind == Kind::kOrder ? cudaEventDisableTiming : cudaEventDefault;
    check(cudaEventCreateWithFlags(&handle_, flags), "cudaEventCreateWithFlags", "flags: ", flags);
  }
  ~Event() {
    if (handle_ != nullptr) cudaEventDestroy(handle_);
  }
  Event(Event&& other) noexcept : handle_(std::exchange(other.handle_, nullptr)) {}
  Event& operator=(Event&& other) noexcept {
    std::swap(handle_, other.handle_);
    return *this;
  }

  void record(cudaStream_t stream) { check(cudaEventRecord(handle_, stream), "cudaEventRecord"); }
  bool try_record(cudaStream_t stream) { return cudaEventRecord(handle_, stream) == cudaSuccess; }

  /// Work issued to `stream` from now on comes after the last `record`.
  void hold(cudaStream_t stream) const {
    check(cudaStreamWaitEvent(stream, handle_, 0), "cudaStreamWaitEvent");
  }

  /// The host waits for the last `record`.
  void wait() const { check(cudaEventSynchronize(handle_), "cudaEventSynchronize"); }

  bool passed() const {
    const cudaError_t state = cudaEventQuery(handle_);
    if (state == cudaErrorNotReady) return false;
    check(state, "cudaEventQuery");
    return true;
  }

  /// Milliseconds from `earlier` to this; both have passed and are of kTime.
  float ms_since(const Event& earlier) const {
    float ms = 0;
    check(cudaEventElapsedTime(&ms, earlier.handle_, handle_), "cudaEventElapsedTime");
    return ms;
  }

 private:
  cudaEvent_t handle_ = nullptr;
};

/// Host memory that GPUs copy from and to at full speed, and that kernels on `device` reach at
/// another address.
class Registration {
 public:
  Registration(std::byte* host, std::int64_t bytes, int device) : bytes_(bytes) {
    const DeviceGuard guard(device);
    const unsigned flags = cudaHostRegisterPortable | cudaHostRegisterMapped;
    check(cudaHostRegister(host, static_cast<std::size_t>(bytes), flags), "cudaHostRegister", bytes,
          " bytes of host memory for optimizer state (free host memory, raise 'ulimit -l', or pass "
          "store=\"disk\")");
    void* mapped = nullptr;
    const cudaError_t error = cudaHostGetDevicePointer(&mapped, host, 0);
    if (error != cudaSuccess) {
      cudaHostUnregister(host);
      check(error, "cudaHostGetDevicePointer", bytes, " bytes");
    }
    host_ = host;
    mapped_ = static_cast<std::byte*>(mapped);
  }
  ~Registration() {
    if (host_ != nullptr) cudaHostUnregister(host_);
  }
  Registration(Registration&& other) noexcept
      : host_(std::exchange(other.host_, nullptr)), mapped_(other.mapped_), bytes_(other.bytes_) {}
  Registration& operator=(Registration&&) = delete;

  /// The address kernels use for `host`, which lies in the registered range.
  std::byte* mapped(std::byte* host) const { return mapped_ + (host - host_); }
  std::int64_t bytes() const { return bytes_; }

 private:
  std::byte* host_ = nullptr;
  std::byte* mapped_ = nullptr;
  std::int64_t bytes_;
};

}  // namespace hift::cuda
