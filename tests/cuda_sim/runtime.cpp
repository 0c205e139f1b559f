// SPDX-License-Identifier: Apache-2.0
// The runtime's functions that the product calls, with the rules that CUDA documents for them. What
// CUDA leaves undefined is an error here: it is kept in the statistics, and the call fails.
#include <cstdio>
#include <cstring>
#include <memory>
#include <string>

#include "memory.h"
#include "streams.h"

using namespace hift_sim;

namespace {

using Guard = std::lock_guard<std::recursive_mutex>;

cudaError_t refuse(const std::string& why, cudaError_t error = cudaErrorInvalidValue) {
  illegal(why);
  return error;
}

bool known(const CUstream_st* stream) {
  for (const CUstream_st* other : all_streams()) {
    if (other == stream) return !stream->destroyed;
  }
  return false;
}

cudaError_t wait_for(CUstream_st* stream, const char* what) {
  run_until([&] { return stream->queue.empty(); }, what);
  acquire(stream);
  return cudaSuccess;
}

/// All work of all devices, of destroyed streams too.
cudaError_t wait_for_all(const char* what) {
  const auto idle = [] {
    for (const CUstream_st* stream : all_streams()) {
      if (!stream->queue.empty()) return false;
    }
    return true;
  };
  run_until(idle, what);
  for (const CUstream_st* stream : all_streams()) acquire(stream);
  return cudaSuccess;
}

/// Whether a queued operation reads or writes the range on the host.
bool pending(const std::byte* host, std::size_t bytes) {
  for (const CUstream_st* stream : all_streams()) {
    for (const auto& operation : stream->queue) {
      if (operation->host < host + bytes && host < operation->host + operation->host_bytes) {
        return true;
      }
    }
  }
  return false;
}

}  // namespace

// A call that can fail begins like this.
#define CAN_FAIL             \
  const Guard guard(lock()); \
  if (to_fail(__func__)) return cudaErrorUnknown

namespace hift_sim {

cudaError_t enqueue(cudaStream_t handle, std::function<void()> body, const char* what) {
  CAN_FAIL;
  CUstream_st* stream = resolve(handle);
  if (!known(stream)) return refuse("a launch on a stream that does not exist");
  if (stream->device != current_device()) {
    return refuse("a launch on a stream of another device than the current one",
                  cudaErrorInvalidResourceHandle);
  }
  push(stream, {Operation::Kind::kRun, std::move(body), nullptr, what, nullptr, 0});
  progress();
  return cudaSuccess;
}

}  // namespace hift_sim

extern "C" {

cudaError_t cudaGetDeviceCount(int* count) {
  *count = kDevices;
  return cudaSuccess;
}

cudaError_t cudaRuntimeGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaDriverGetVersion(int* version) {
  *version = CUDART_VERSION;
  return cudaSuccess;
}

cudaError_t cudaGetDevice(int* device) {
  CAN_FAIL;
  *device = current_device();
  return cudaSuccess;
}

cudaError_t cudaSetDevice(int device) {
  CAN_FAIL;
  if (device < 0 || device >= kDevices) {
    return refuse("cudaSetDevice of a device that does not exist", cudaErrorInvalidDevice);
  }
  current_device() = device;
  return cudaSuccess;
}

cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr what, int device) {
  if (device < 0 || device >= kDevices) {
    return refuse("cudaDeviceGetAttribute of a device that does not exist", cudaErrorInvalidDevice);
  }
  switch (what) {
    case cudaDevAttrAsyncEngineCount:
      *value = 2;
      return cudaSuccess;
    case cudaDevAttrClockRate:  // kHz
      *value = 1'500'000;
      return cudaSuccess;
    case cudaDevAttrMemoryClockRate:
      *value = 8'001'000;
      return cudaSuccess;
    case cudaDevAttrGlobalMemoryBusWidth:  // bits
      *value = 384;
      return cudaSuccess;
    default:
      return refuse("cudaDeviceGetAttribute of what is not simulated");
  }
}

cudaError_t cudaDeviceGetPCIBusId(char* to, int size, int device) {
  if (device < 0 || device >= kDevices) {
    return refuse("cudaDeviceGetPCIBusId of a device that does not exist", cudaErrorInvalidDevice);
  }
  std::snprintf(to, static_cast<std::size_t>(size), "0000:%02X:00.0", 0x65 + device);
  return cudaSuccess;
}

const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : "simulated error";
}

cudaError_t cudaGetLastError() { return cudaSuccess; }

cudaError_t cudaMalloc(void** address, std::size_t bytes) {
  CAN_FAIL;
  *address = add_block(bytes);
  return *address != nullptr ? cudaSuccess : cudaErrorMemoryAllocation;
}

cudaError_t cudaFree(void* address) {
  const Guard guard(lock());
  wait_for_all("cudaFree");
  if (address == nullptr || remove_block(static_cast<std::byte*>(address))) return cudaSuccess;
  return refuse("cudaFree of what cudaMalloc did not give");
}

cudaError_t cudaHostRegister(void* address, std::size_t bytes, unsigned) {
  CAN_FAIL;
  if (bytes == 0) return refuse("cudaHostRegister of no bytes");
  if (!add_range(static_cast<std::byte*>(address), bytes)) {
    return refuse("cudaHostRegister of a range that is registered in part",
                  cudaErrorHostMemoryAlreadyRegistered);
  }
  return cudaSuccess;
}

cudaError_t cudaHostUnregister(void* address) {
  const Guard guard(lock());
  std::size_t bytes = 0;
  if (!remove_range(static_cast<std::byte*>(address), &bytes)) {
    return refuse("cudaHostUnregister of what is not registered", cudaErrorHostMemoryNotRegistered);
  }
  if (pending(static_cast<std::byte*>(address), bytes)) {
    return refuse("cudaHostUnregister of a range that queued copies use");
  }
  return cudaSuccess;
}

cudaError_t cudaHostGetDevicePointer(void** device, void* host, unsigned) {
  CAN_FAIL;
  if (!in_range(host, 1)) return refuse("cudaHostGetDevicePointer of what is not registered");
  *device = host;
  return cudaSuccess;
}

cudaError_t cudaMemcpyAsync(void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind,
                            cudaStream_t handle) {
  CAN_FAIL;
  CUstream_st* stream = resolve(handle);
  if (!known(stream)) return refuse("cudaMemcpyAsync on a stream that does not exist");
  if (kind == cudaMemcpyDeviceToDevice) {
    if (!in_block(to, bytes) || !in_block(from, bytes)) {
      return refuse("cudaMemcpyAsync beside the device's memory");
    }
    push(stream, {Operation::Kind::kRun, [=] { std::memcpy(to, from, bytes); }, nullptr,
                  "copy on the device", nullptr, 0});
    progress();
    return cudaSuccess;
  }
  const bool in = kind == cudaMemcpyHostToDevice;
  if (!in && kind != cudaMemcpyDeviceToHost) return refuse("cudaMemcpyAsync of another kind");
  const void* device = in ? to : from;
  const void* host = in ? from : to;
  if (!in_block(device, bytes)) {
    return refuse("cudaMemcpyAsync beside the device's memory, or in the other direction");
  }
  if (in_block(host, 1)) return refuse("cudaMemcpyAsync: the host's address is the device's");
  Operation copy{Operation::Kind::kRun,
                 [=] { std::memcpy(to, from, bytes); },
                 nullptr,
                 in ? "copy to the device" : "copy to the host",
                 static_cast<const std::byte*>(host),
                 bytes};
  if (in_range(host, bytes)) {
    push(stream, std::move(copy));
    progress();
    return cudaSuccess;
  }
  // Not registered: the host waits, for the staging of what goes in, for all of what comes out.
  ++counts().pageable_copies;
  push(stream, std::move(copy));
  return wait_for(stream, "a pageable copy");
}

cudaError_t cudaStreamCreateWithFlags(cudaStream_t* handle, unsigned flags) {
  CAN_FAIL;
  auto* stream = new CUstream_st;
  stream->device = current_device();
  stream->blocking = (flags & cudaStreamNonBlocking) == 0;
  add_stream(stream);
  *handle = stream;
  return cudaSuccess;
}

cudaError_t cudaStreamDestroy(cudaStream_t stream) {
  const Guard guard(lock());
  if (!known(stream)) return refuse("cudaStreamDestroy of a stream that does not exist");
  remove_stream(stream);
  return cudaSuccess;
}

cudaError_t cudaStreamSynchronize(cudaStream_t handle) {
  CAN_FAIL;
  CUstream_st* stream = resolve(handle);
  if (!known(stream)) return refuse("cudaStreamSynchronize of a stream that does not exist");
  return wait_for(stream, "cudaStreamSynchronize");
}

cudaError_t cudaDeviceSynchronize() {
  CAN_FAIL;
  return wait_for_all("cudaDeviceSynchronize");
}

cudaError_t cudaStreamWaitEvent(cudaStream_t handle, cudaEvent_t event, unsigned) {
  CAN_FAIL;
  CUstream_st* stream = resolve(handle);
  if (!known(stream)) return refuse("cudaStreamWaitEvent on a stream that does not exist");
  if (event->mark != nullptr) hold(stream, event->mark);
  progress();
  return cudaSuccess;
}

cudaError_t cudaEventCreateWithFlags(cudaEvent_t* handle, unsigned flags) {
  CAN_FAIL;
  auto* event = new CUevent_st;
  event->device = current_device();
  event->timed = (flags & cudaEventDisableTiming) == 0;
  *handle = event;
  ++counts().events;
  return cudaSuccess;
}

cudaError_t cudaEventDestroy(cudaEvent_t event) {
  const Guard guard(lock());
  delete event;
  --counts().events;
  return cudaSuccess;
}

cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t handle) {
  CAN_FAIL;
  CUstream_st* stream = resolve(handle);
  if (!known(stream)) return refuse("cudaEventRecord on a stream that does not exist");
  if (event->device != stream->device) {
    return refuse("cudaEventRecord on a stream of another device", cudaErrorInvalidResourceHandle);
  }
  event->mark = record(stream);
  progress();
  return cudaSuccess;
}

cudaError_t cudaEventQuery(cudaEvent_t event) {
  CAN_FAIL;
  progress();
  if (event->mark != nullptr && !event->mark->passed) return cudaErrorNotReady;
  if (event->mark != nullptr) acquire(event->mark.get());
  return cudaSuccess;
}

cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  CAN_FAIL;
  if (event->mark == nullptr) return cudaSuccess;
  run_until([&] { return event->mark->passed; }, "cudaEventSynchronize");
  acquire(event->mark.get());
  return cudaSuccess;
}

cudaError_t cudaEventElapsedTime(float* ms, cudaEvent_t begin, cudaEvent_t end) {
  CAN_FAIL;
  if (!begin->timed || !end->timed) {
    return refuse("cudaEventElapsedTime of events made without timing",
                  cudaErrorInvalidResourceHandle);
  }
  if (begin->mark == nullptr || end->mark == nullptr || !begin->mark->passed ||
      !end->mark->passed) {
    return cudaErrorNotReady;
  }
  constexpr double kMsPerOperation = 0.01;
  *ms = static_cast<float>(kMsPerOperation * (end->mark->tick - begin->mark->tick));
  return cudaSuccess;
}

}  // extern "C"
