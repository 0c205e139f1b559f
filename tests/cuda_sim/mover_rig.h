// SPDX-License-Identifier: Apache-2.0
// A mover between four pages in host memory and a ring of three slots on the simulated device, and
// what runs a test under many schedules.
#pragma once

#include <chrono>
#include <cstring>
#include <functional>
#include <memory>

#include "check.h"
#include "cuda/mover.h"
#include "sim.h"

namespace hift_test {

using namespace hift_sim;
using hift::Page;
using hift::PageTable;
using hift::RamStore;
using hift::cuda::DeviceGuard;
using hift::cuda::RamMover;

inline constexpr int kDevice = 1, kSlots = 3, kSchedules = 60;
inline constexpr std::int64_t kElements = 1024;  // of a page

/// Four pages of one stream, a ring of three slots, two compute streams.
struct Rig {
  Rig() : table({{4, 0}}, kElements * 4) {
    table.add_group(4 * kElements);
    store.grow(table);
    for (std::int64_t p = 0; p < 4; ++p) {
      table.touch(p);
      fill(host(p), static_cast<float>(p + 1));
    }
    const DeviceGuard guard(kDevice);
    cudaMalloc(&ring, kSlots * kElements * 4);
    cudaMalloc(&aside, kElements * 4);
    for (cudaStream_t& stream : streams) cudaStreamCreateWithFlags(&stream, cudaStreamNonBlocking);
    registry = std::make_unique<hift::cuda::Registry>(kDevice);
    const hift::cuda::RingMemory memory{static_cast<std::byte*>(ring), kSlots, kElements * 4,
                                        kDevice};
    mover = std::make_unique<RamMover>(store, table, *registry, memory);
  }

  ~Rig() {
    for (cudaStream_t stream : streams) cudaStreamSynchronize(stream);
    mover.reset();
    registry.reset();
    for (cudaStream_t stream : streams) cudaStreamDestroy(stream);
    cudaFree(ring);
    cudaFree(aside);
  }

  static void fill(std::byte* to, float value) {
    for (std::int64_t i = 0; i < kElements; ++i) std::memcpy(to + 4 * i, &value, 4);
  }
  static bool all(const std::byte* values, float value) {
    for (std::int64_t i = 0; i < kElements; ++i) {
      if (std::memcmp(values + 4 * i, &value, 4) != 0) return false;
    }
    return true;
  }

  std::byte* host(std::int64_t page) { return store.address(table, table.page(page), 0); }

  /// A kernel that writes the slot.
  void write(int slot, float value, int stream = 0) {
    std::byte* to = mover->slot_address(slot);
    launch(stream, [to, value] { fill(to, value); });
  }
  /// A kernel that keeps what it finds in the slot.
  void keep(int slot, int stream = 0) {
    const std::byte* from = mover->slot_address(slot);
    launch(stream, [this, from] { std::memcpy(aside, from, kElements * 4); });
  }
  /// What was kept is `value` everywhere.
  bool kept(float value, int stream = 0) {
    bool same = false;
    launch(stream, [&] { same = all(static_cast<const std::byte*>(aside), value); });
    cudaStreamSynchronize(streams[stream]);
    return same;
  }
  void launch(int stream, std::function<void()> body) {
    const DeviceGuard guard(kDevice);
    hift::cuda::check(enqueue(streams[stream], std::move(body), "kernel"), "enqueue");
  }

  PageTable table;
  RamStore store;
  void* ring = nullptr;
  void* aside = nullptr;
  cudaStream_t streams[2] = {};
  std::unique_ptr<hift::cuda::Registry> registry;
  std::unique_ptr<RamMover> mover;
};

inline double ms(hift::Clock::duration d) {
  return std::chrono::duration<double, std::milli>(d).count();
}

/// Runs `body` under many schedules; it returns whether all was right.
template <class Body>
void under_schedules(Body body) {
  for (unsigned seed = 0; seed < kSchedules; ++seed) {
    begin(schedule_of(seed));
    bool right = false;
    {
      Rig rig;
      right = body(rig);
    }
    CHECK(right && stats().error.empty(), "schedule ", seed, ": ", stats().error);
  }
}

}  // namespace hift_test
