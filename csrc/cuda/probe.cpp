// SPDX-License-Identifier: Apache-2.0
// Copies for the probe. Each way of the link has a stream, as the mover's have, so that what is
// measured at once runs at once.
#include "cuda/probe.h"

#include "core/check.h"

namespace hift::cuda {

Bus::Bus(std::byte* source, std::byte* target, std::byte* near, std::byte* far, std::int64_t bytes,
         int device)
    : host_source_(source),
      host_target_(target),
      near_(near),
      far_(far),
      bytes_(bytes),
      device_(device),
      source_(source, bytes, device),
      target_(target, bytes, device),
      in_(device),
      out_(device),
      begin_(device, Event::Kind::kTime),
      side_(device),
      end_(device, Event::Kind::kTime) {}

Bus::~Bus() {
  // Copies and kernels may still use the registered ranges.
  cudaStreamSynchronize(in_.get());
  cudaStreamSynchronize(out_.get());
}

void Bus::copy(Path path, std::int64_t bytes) {
  check_argument(bytes > 0 && bytes <= bytes_, "a copy of ", bytes, " bytes; the ranges have ",
                 bytes_);
  const DeviceGuard guard(device_);
  const auto queue = [&](std::byte* to, const std::byte* from, cudaMemcpyKind kind,
                         const Stream& stream) {
    check(cudaMemcpyAsync(to, from, static_cast<std::size_t>(bytes), kind, stream.get()),
          "cudaMemcpyAsync", bytes, " bytes");
  };
  switch (path) {
    case Path::kToDevice:
      return queue(near_, host_source_, cudaMemcpyHostToDevice, in_);
    case Path::kToHost:
      return queue(host_target_, far_, cudaMemcpyDeviceToHost, out_);
    case Path::kOnDevice:
      return queue(far_, near_, cudaMemcpyDeviceToDevice, in_);
  }
  check_argument(false, "path ", static_cast<int>(path), " is not one of 0, 1, 2");
}

void Bus::start() {
  const DeviceGuard guard(device_);
  begin_.record(in_.get());
  // Nothing of the other way may run before the clock does.
  begin_.hold(out_.get());
}

double Bus::stop() {
  const DeviceGuard guard(device_);
  side_.record(out_.get());
  // The clock stops when both ways have ended.
  side_.hold(in_.get());
  end_.record(in_.get());
  // The host reads the clock, and may change what was copied.
  end_.wait();
  return end_.ms_since(begin_);
}

DeviceFacts device_facts(int device) {
  DeviceFacts facts;
  const auto ask = [&](cudaDeviceAttr what) {
    int value = 0;
    check(cudaDeviceGetAttribute(&value, what, device), "cudaDeviceGetAttribute", "attribute ",
          static_cast<int>(what), " of device ", device);
    return value;
  };
  char pci[32] = {};
  check(cudaDeviceGetPCIBusId(pci, sizeof pci, device), "cudaDeviceGetPCIBusId", "device ", device);
  facts.pci = pci;
  facts.copy_engines = ask(cudaDevAttrAsyncEngineCount);
  facts.clock_hz = std::int64_t{1000} * ask(cudaDevAttrClockRate);
  facts.memory_hz = std::int64_t{1000} * ask(cudaDevAttrMemoryClockRate);
  facts.bus_bits = ask(cudaDevAttrGlobalMemoryBusWidth);
  return facts;
}

}  // namespace hift::cuda
