// SPDX-License-Identifier: Apache-2.0
// Measuring what pages travel over: copies between registered host memory and the device, timed by
// events as they run. And what the driver tells of a device.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "cuda/handles.h"

namespace hift::cuda {

enum class Path : int { kToDevice = 0, kToHost = 1, kOnDevice = 2 };

/// Two ranges of host memory, registered while this lives, and two of the device. All are of
/// `bytes` bytes and outlive this.
class Bus {
 public:
  Bus(std::byte* source, std::byte* target, std::byte* near, std::byte* far, std::int64_t bytes,
      int device);
  /// Waits for all that is queued.
  ~Bus();

  /// Queues a copy of the first `bytes`: source to near, far to target, or near to far. Each way of
  /// the link has a stream of its own.
  void copy(Path path, std::int64_t bytes);

  /// What is queued from here on, by `copy` and on `stream()`, until `stop` is timed.
  void start();
  /// Waits for it. Milliseconds it took.
  double stop();

  cudaStream_t stream() const { return in_.get(); }
  /// The addresses that kernels use for the host's ranges.
  std::byte* mapped_source() const { return source_.mapped(host_source_); }
  std::byte* mapped_target() const { return target_.mapped(host_target_); }

 private:
  std::byte *host_source_, *host_target_, *near_, *far_;
  std::int64_t bytes_;
  int device_;
  Registration source_, target_;
  Stream in_, out_;
  Event begin_, side_, end_;
};

/// What torch does not tell of a device. Throws std::runtime_error for a device that is not there.
struct DeviceFacts {
  std::string pci;             // 0000:65:00.0
  int copy_engines = 0;        // copies that run at once
  std::int64_t clock_hz = 0;   // of the multiprocessors, at most
  std::int64_t memory_hz = 0;  // of the memory, which moves bits twice a period
  int bus_bits = 0;
};
DeviceFacts device_facts(int device);

}  // namespace hift::cuda
