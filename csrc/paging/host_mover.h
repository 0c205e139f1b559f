// SPDX-License-Identifier: Apache-2.0
// The mover of the host: slots in one slab, and threads of its own that read and write the store.
// It never spins; its threads take no signal.
#pragma once

#include <cstdint>
#include <functional>
#include <memory>

#include "paging/mover.h"
#include "paging/owner.h"
#include "paging/store.h"

namespace hift {

class HostMover final : public Mover {
 public:
  /// Called on the copying threads with the page and the slot; what one throws fails the copy.
  struct Hooks {
    using Call = std::function<void(const Page&, int)>;
    Call before_read, after_read, before_write;
  };

  /// `slots` slots of `slot_bytes` bytes (rounded up to the table's alignment). `store` and `table`
  /// outlive the mover.
  HostMover(Store& store, const PageTable& table, int slots, std::int64_t slot_bytes, int readers,
            int writers, Hooks hooks = {});

  /// Finishes the write-backs under way, then ends the threads. Errors are lost: drain first.
  ~HostMover() override;

  /// The same without freeing the slots: nothing may be moved any more.
  void stop();

  std::byte* slot_address(int slot) override;
  std::int64_t slot_bytes() const override { return slot_bytes_; }
  void fetch(const Page& page, int slot) override;
  double await(int slot, void* stream) override;
  void wait(int slot) override;
  void write_back(const Page& page, int slot, void* stream) override;
  void retry(int slot) override;
  bool failed(int slot) const override;
  std::int64_t unsaved(int slot) const override;
  void drain() override;
  double take_busy_ms() override;
  void log_to(IntervalLog& log) override { log_to(log, Interval::Kind::kIn, Interval::Kind::kOut); }
  void log_to(IntervalLog& log, Interval::Kind in, Interval::Kind out);

 private:
  struct State;
  void check(int slot) const;
  void issue(const Page& page, int slot, bool out);

  OwnerProcess owner_;
  const PageTable& table_;
  int slots_;
  std::int64_t slot_bytes_;
  std::unique_ptr<State> state_;
};

}  // namespace hift
