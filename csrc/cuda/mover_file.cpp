// SPDX-License-Identifier: Apache-2.0
// Two stages in each direction. The threads of the file join them: one that has read a record
// starts its copy to the device, one that is to write a record waits for its copy from the device.
#include <algorithm>
#include <utility>

#include "cuda/mover.h"

namespace hift::cuda {

FileMover::FileMover(Store& store, const PageTable& table, const RingMemory& ring, int readers,
                     int writers)
    : DeviceMover(table, ring) {
  HostMover::Hooks hooks;
  hooks.before_read = [this](const Page&, int slot) {
    // The record before is still being copied from the pinned slot to the device.
    ring_.wait_in(slot);
  };
  hooks.after_read = [this](const Page& page, int slot) {
    ring_.copy_in(page, slot, parts(page, slot), -1);
  };
  hooks.before_write = [this](const Page&, int slot) {
    // The record is still being copied from the device to the pinned slot.
    ring_.wait_out(slot);
  };
  host_ = std::make_unique<HostMover>(store, table, ring.slots, ring.slot_bytes, readers, writers,
                                      std::move(hooks));
  pinned_ = std::make_unique<Registration>(host_->slot_address(0), host_->slot_bytes() * ring.slots,
                                           ring.device);
}

FileMover::~FileMover() {
  // No thread starts a copy any more,
  host_->stop();
  // and none is under way: the pinned slots may go.
  ring_.finish();
  pinned_.reset();
}

std::vector<DeviceRing::Part> FileMover::parts(const Page& page, int slot) {
  return {{0, host_->slot_address(slot), table_.record_bytes(page)}};
}

void FileMover::fetch(const Page& page, int slot) {
  check(slot, &page);
  check_saved(page);
  host_->fetch(page, slot);
}

double FileMover::await(int slot, void* stream) {
  check(slot);
  // The host waits for the file; a copy to the device is then at least queued.
  const double ms = host_->await(slot, nullptr);
  return ms + DeviceMover::await(slot, stream);
}

void FileMover::wait(int slot) {
  check(slot);
  // A thread may not have started its copy yet.
  host_->wait(slot);
  DeviceMover::wait(slot);
}

void FileMover::write_back(const Page& page, int slot, void* stream) {
  check(slot, &page);
  // A thread may not have started its copy into the slot yet, or still write the pinned slot to the
  // file.
  host_->wait(slot);
  DeviceMover::write_back(page, slot, stream);
}

void FileMover::go_on(const Page& page, int slot) { host_->write_back(page, slot, nullptr); }

void FileMover::retry(int slot) {
  if (host_->failed(slot)) host_->retry(slot);
  DeviceMover::retry(slot);
}

bool FileMover::failed(int slot) const { return DeviceMover::failed(slot) || host_->failed(slot); }

std::int64_t FileMover::unsaved(int slot) const {
  return std::max(DeviceMover::unsaved(slot), host_->unsaved(slot));
}

void FileMover::drain() {
  // Threads start copies, and wait for those that they write from.
  host_->drain();
  // What they started is under way.
  DeviceMover::drain();
}

void FileMover::log_to(IntervalLog& log) {
  DeviceMover::log_to(log);
  host_->log_to(log, Interval::Kind::kRead, Interval::Kind::kWrite);
}

double FileMover::take_busy_ms() {
  // The file is the slower stage, and the other one lies almost wholly within its time.
  return std::max(host_->take_busy_ms(), DeviceMover::take_busy_ms());
}

}  // namespace hift::cuda
