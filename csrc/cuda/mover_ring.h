// SPDX-License-Identifier: Apache-2.0
// The ring in device memory: slots, the two streams that copy into and out of them, and what must
// wait for what. It knows slots and bytes; which page is where is its owner's business.
#pragma once

#include <cstddef>
#include <cstdint>
#include <mutex>
#include <vector>

#include "cuda/handles.h"
#include "cuda/stopwatch.h"
#include "paging/page_table.h"
#include "paging/store.h"

namespace hift::cuda {

/// Calls for one slot come one after the other; `copy_in` may come from any thread.
class DeviceRing {
 public:
  /// `memory` holds `slots` slots of `slot_bytes` bytes on `device` and outlives the ring.
  DeviceRing(std::byte* memory, int slots, std::int64_t slot_bytes, int device);

  /// Waits for its copies. Errors are lost.
  ~DeviceRing();

  /// A part of a record: bytes from `offset` of the slot on, and where they are on the host.
  struct Part {
    std::int64_t offset;
    std::byte* host;  // registered
    std::int64_t bytes;
  };

  std::byte* address(int slot) { return memory_ + slot * slot_bytes_; }
  std::int64_t slot_bytes() const { return slot_bytes_; }
  int slots() const { return static_cast<int>(slots_.size()); }

  /// Starts copies of `page` into `slot`, after those out of `after` (-1: no other slot).
  void copy_in(const Page& page, int slot, const std::vector<Part>& parts, int after);

  /// The slot is used by work on `stream`.
  void follow(int slot, cudaStream_t stream) { slots_[slot].stream = stream; }

  /// Starts copies of `page` out of `slot`, behind the work queued so far on the stream that uses
  /// it.
  void copy_out(const Page& page, int slot, const std::vector<Part>& parts);

  /// Work that follows on `stream` finds in the slot what was copied in, and may change it.
  void hand_over(int slot, cudaStream_t stream);

  /// The host waits for the last copy into the slot, out of it, for everything that uses it, for
  /// all.
  void wait_in(int slot);
  void wait_out(int slot);
  void wait(int slot);
  void drain();
  void finish() noexcept;  // the same, and errors are lost

  /// Fills elements behind the work queued on `stream`.
  void fill(int slot, std::int64_t offset, std::int64_t count, const hift::Stream& pattern,
            cudaStream_t stream);

  /// Copies bytes to and from any host memory; done on return.
  void peek(int slot, std::int64_t offset, std::int64_t bytes, std::byte* to);
  void poke(int slot, std::int64_t offset, std::int64_t bytes, const std::byte* from);

  double take_copy_ms();  // copies were under way
  double take_wait_ms();  // work handed a slot stood still for it
  void log_to(IntervalLog& log);

 private:
  struct Slot {
    explicit Slot(int device) : arrived(device), left(device), used(device) {}
    Event arrived;                  // the last copy into the slot
    Event left;                     // the last copy out of it
    Event used;                     // the work that was handed the slot
    cudaStream_t stream = nullptr;  // where that work is queued
    bool in_use = false;            // and no copy waits for it yet
  };
  /// Calls `visit(bounce, done, bytes)` for parts of a transfer that fit into the bounce buffer.
  template <class Visit>
  void in_pieces(int slot, std::int64_t bytes, Visit visit);

  std::byte* memory_;
  std::int64_t slot_bytes_;
  int device_;
  Slab bounce_memory_;  // host memory that users hand us is not registered
  Registration bounce_;
  Stream in_, out_, aside_;
  std::vector<Slot> slots_;
  std::mutex mutex_;  // of the stopwatch for copies
  Stopwatch copies_, waits_;
};

}  // namespace hift::cuda
