// SPDX-License-Identifier: Apache-2.0
// The CUDA runtime's calls that a step makes: checked, and undone at the end of a scope.
// The tests put their own in place of this file and so run the kernel on the host.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <stdexcept>

#include "core/check.h"

namespace hift::cuda {

/// Throws std::runtime_error with CUDA's own words, the `call` that failed, and `parts`.
template <class... Parts>
void check(cudaError_t error, const char* call, const Parts&... parts) {
  if (error == cudaSuccess) return;
  throw std::runtime_error(text(call, " failed: ", cudaGetErrorString(error), " (CUDA error ",
                                static_cast<int>(error), "); ", parts...));
}

/// Makes `device` the calling thread's current device until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice", "device wanted: ", device);
    if (device == before_) return;
    check(cudaSetDevice(device), "cudaSetDevice", "device: ", device);
    changed_ = true;
  }
  ~DeviceGuard() {
    if (changed_)
      cudaSetDevice(before_);  // it was current before, so this cannot fail in a new way
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

/// Launches `kernel` with one argument, passed by value.
template <class Argument>
void launch(void (*kernel)(Argument), std::int64_t blocks, int threads, void* stream,
            const Argument& argument) {
  void* arguments[] = {const_cast<Argument*>(&argument)};
  check(cudaLaunchKernel(kernel, dim3(static_cast<unsigned>(blocks)),
                         dim3(static_cast<unsigned>(threads)), arguments, 0,
                         static_cast<cudaStream_t>(stream)),
        "cudaLaunchKernel", "blocks: ", blocks, ", threads: ", threads, ", stream: ", stream);
}

}  // namespace hift::cuda
