// SPDX-License-Identifier: Apache-2.0
// Pages travel between host memory, or a file, and a ring of slots in device memory. What both ways
// share is here: the ring, and what becomes of a slot whose copy CUDA refused.
#pragma once

#include <cstdint>
#include <exception>
#include <memory>
#include <unordered_map>
#include <vector>

#include "cuda/mover_registry.h"
#include "cuda/mover_ring.h"
#include "paging/host_mover.h"
#include "paging/mover.h"
#include "paging/store.h"

namespace hift::cuda {

/// The ring a mover copies into: `memory` on `device`, of at least slots * slot_bytes bytes.
struct RingMemory {
  std::byte* memory = nullptr;
  int slots = 0;
  std::int64_t slot_bytes = 0;
  int device = 0;
};

class DeviceMover : public Mover {
 public:
  DeviceMover(const PageTable& table, const RingMemory& ring);

  std::byte* slot_address(int slot) override;
  std::int64_t slot_bytes() const override { return ring_.slot_bytes(); }
  double await(int slot, void* stream) override;
  void wait(int slot) override;
  void write_back(const Page& page, int slot, void* stream) override;
  void retry(int slot) override;
  bool failed(int slot) const override;
  std::int64_t unsaved(int slot) const override;
  void drain() override;
  double take_busy_ms() override;
  double take_wait_ms() override;
  void log_to(IntervalLog& log) override { ring_.log_to(log); }
  void fill(int slot, std::int64_t offset, std::int64_t count, const hift::Stream& pattern,
            void* stream) override;
  void peek(int slot, std::int64_t offset, std::int64_t bytes, std::byte* to) override;
  void poke(int slot, std::int64_t offset, std::int64_t bytes, const std::byte* from) override;

 protected:
  /// The parts of a page's record on their way from `slot` to the host.
  virtual std::vector<DeviceRing::Part> parts(const Page& page, int slot) = 0;
  /// The record has a way on from the host after it was copied out of the slot.
  virtual void go_on(const Page& /*page*/, int /*slot*/) {}

  /// Throws the slot's failure, and for a page that no slot holds.
  void check(int slot, const Page* page = nullptr) const;
  /// Throws if the store does not have the page's last bytes.
  void check_saved(const Page& page) const;

  const PageTable& table_;
  DeviceRing ring_;

 private:
  struct Failure {
    std::exception_ptr error;
    std::uint64_t number;
    bool unsaved;  // the slot's bytes did not leave it
    Page page;
  };
  void send(const Page& page, int slot);

  std::unordered_map<int, Failure> failures_;
  std::uint64_t failure_count_ = 0;
};

/// Between a slab of host memory, registered group by group at its first copy, and the ring.
class RamMover final : public DeviceMover {
 public:
  RamMover(RamStore& store, const PageTable& table, Registry& registry, const RingMemory& ring);
  void fetch(const Page& page, int slot) override;

 private:
  std::vector<DeviceRing::Part> parts(const Page& page, int slot) override;
  std::vector<DeviceRing::Part> record(const Page& page);

  RamStore& store_;
  Registry& registry_;
  std::unordered_map<std::int64_t, int> left_from_;  // page -> slot it was written back from last
};

/// Between a file and the ring, by pinned slots on the host that the file's threads read and write.
/// A pinned slot belongs to the device slot of its number.
class FileMover final : public DeviceMover {
 public:
  FileMover(Store& store, const PageTable& table, const RingMemory& ring, int readers, int writers);
  ~FileMover() override;
  void fetch(const Page& page, int slot) override;
  double await(int slot, void* stream) override;
  void wait(int slot) override;
  void write_back(const Page& page, int slot, void* stream) override;
  void retry(int slot) override;
  bool failed(int slot) const override;
  std::int64_t unsaved(int slot) const override;
  void drain() override;
  double take_busy_ms() override;
  void log_to(IntervalLog& log) override;

 private:
  std::vector<DeviceRing::Part> parts(const Page& page, int slot) override;
  void go_on(const Page& page, int slot) override;

  std::unique_ptr<HostMover> host_;
  std::unique_ptr<Registration> pinned_;
};

}  // namespace hift::cuda
