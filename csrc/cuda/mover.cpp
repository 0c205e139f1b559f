// SPDX-License-Identifier: Apache-2.0
// A call that CUDA refuses leaves the slot's bytes where they are: they are the page's only good
// ones until a retry has sent them on their way.
#include "cuda/mover.h"

#include <utility>

namespace hift::cuda {

DeviceMover::DeviceMover(const PageTable& table, const RingMemory& ring)
    : table_(table), ring_(ring.memory, ring.slots, ring.slot_bytes, ring.device) {}

void DeviceMover::check(int slot, const Page* page) const {
  check_argument(slot >= 0 && slot < ring_.slots(), "slot ", slot, " is not one of ",
                 ring_.slots());
  if (const auto found = failures_.find(slot); found != failures_.end()) {
    std::rethrow_exception(found->second.error);
  }
  if (page == nullptr) return;
  check_argument(table_.record_bytes(*page) <= ring_.slot_bytes(), "page ", page->index, " has ",
                 table_.record_bytes(*page), " bytes; a slot holds ", ring_.slot_bytes());
}

void DeviceMover::check_saved(const Page& page) const {
  for (const auto& [slot, failure] : failures_) {
    if (failure.unsaved && failure.page.index == page.index) {
      std::rethrow_exception(failure.error);
    }
  }
}

std::byte* DeviceMover::slot_address(int slot) {
  check_argument(slot >= 0 && slot < ring_.slots(), "slot ", slot, " is not one of ",
                 ring_.slots());
  return ring_.address(slot);
}

double DeviceMover::await(int slot, void* stream) {
  check(slot);
  ring_.hand_over(slot, static_cast<cudaStream_t>(stream));
  return 0;  // the stream waits, not the host
}

void DeviceMover::wait(int slot) {
  check(slot);
  ring_.wait(slot);
}

void DeviceMover::write_back(const Page& page, int slot, void* stream) {
  check(slot, &page);
  // Newer bytes of the page are on their way: older ones that were lost must not follow them.
  for (auto& [other, failure] : failures_) {
    if (failure.page.index == page.index) failure.unsaved = false;
  }
  ring_.follow(slot, static_cast<cudaStream_t>(stream));
  send(page, slot);
}

void DeviceMover::send(const Page& page, int slot) {
  try {
    ring_.copy_out(page, slot, parts(page, slot));
    go_on(page, slot);
  } catch (...) {
    failures_.insert_or_assign(slot,
                               Failure{std::current_exception(), failure_count_++, true, page});
  }
}

void DeviceMover::retry(int slot) {
  const auto found = failures_.find(slot);
  if (found == failures_.end()) return;
  const Failure failure = found->second;
  failures_.erase(found);
  if (failure.unsaved) send(failure.page, slot);
}

bool DeviceMover::failed(int slot) const { return failures_.count(slot) != 0; }

std::int64_t DeviceMover::unsaved(int slot) const {
  const auto found = failures_.find(slot);
  return found != failures_.end() && found->second.unsaved ? found->second.page.index : -1;
}

void DeviceMover::drain() {
  ring_.drain();
  const Failure* first = nullptr;
  for (const auto& [slot, failure] : failures_) {
    if (first == nullptr || failure.number < first->number) first = &failure;
  }
  if (first != nullptr) std::rethrow_exception(first->error);
}

double DeviceMover::take_busy_ms() { return ring_.take_copy_ms(); }

double DeviceMover::take_wait_ms() { return ring_.take_wait_ms(); }

void DeviceMover::fill(int slot, std::int64_t offset, std::int64_t count,
                       const hift::Stream& pattern, void* stream) {
  check(slot);
  ring_.fill(slot, offset, count, pattern, static_cast<cudaStream_t>(stream));
}

void DeviceMover::peek(int slot, std::int64_t offset, std::int64_t bytes, std::byte* to) {
  ring_.peek(slot, offset, bytes, to);
}

void DeviceMover::poke(int slot, std::int64_t offset, std::int64_t bytes, const std::byte* from) {
  ring_.poke(slot, offset, bytes, from);
}

RamMover::RamMover(RamStore& store, const PageTable& table, Registry& registry,
                   const RingMemory& ring)
    : DeviceMover(table, ring), store_(store), registry_(registry) {}

std::vector<DeviceRing::Part> RamMover::parts(const Page& page, int slot) {
  registry_.add(store_, table_, page.group);
  left_from_[page.index] = slot;
  return record(page);
}

std::vector<DeviceRing::Part> RamMover::record(const Page& page) {
  std::vector<DeviceRing::Part> parts;
  for (int s = 0; s < static_cast<int>(table_.streams().size()); ++s) {
    parts.push_back({table_.stream_offset(page, s), store_.address(table_, page, s),
                     table_.streams()[s].bytes(page.extent)});
  }
  return parts;
}

void RamMover::fetch(const Page& page, int slot) {
  check(slot, &page);
  check_saved(page);
  registry_.add(store_, table_, page.group);
  const auto from = left_from_.find(page.index);
  ring_.copy_in(page, slot, record(page), from == left_from_.end() ? -1 : from->second);
}

}  // namespace hift::cuda
