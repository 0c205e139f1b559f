// SPDX-License-Identifier: Apache-2.0
// How bytes travel between the store, where pages rest, and the ring's slots, where pages are
// updated. Every copy starts and returns at once; what must wait for what is the mover's business.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstring>

#include "core/intervals.h"
#include "paging/page_table.h"

namespace hift {

/// The order a mover keeps, whatever runs at the same time:
///   1. calls that name one slot take effect in the order they were issued; different slots
///   overlap;
///   2. a fetch of a page sees the bytes of the last write-back of that page, from whichever slot
///      it came, and never those of a later one.
/// So a slot may be given its next page while the last one is still on its way out. `stream` is the
/// compute stream the updates run on (a CUDA stream handle; null on the host, where a wait blocks
/// the caller instead).
///
/// A failed copy leaves its slot failed: copies queued behind it are dropped, its bytes stay
/// readable (`peek`), and every call that would use the slot throws the first error, until `retry`.
/// A fetch of a page whose write-back has failed fails with it: the store's bytes are not the
/// page's.
class Mover {
 public:
  virtual ~Mover() = default;

  /// Where slot `slot` lives in compute memory, and the bytes of a slot.
  virtual std::byte* slot_address(int slot) = 0;
  virtual std::int64_t slot_bytes() const = 0;

  /// Starts bringing the record of `page` into `slot`.
  virtual void fetch(const Page& page, int slot) = 0;

  /// Work that follows on `stream` sees what was issued on `slot` so far. Returns the milliseconds
  /// the host waited.
  virtual double await(int slot, void* stream) = 0;

  /// The host waits until everything issued on `slot` is done.
  virtual void wait(int slot) = 0;

  /// Starts writing `slot` back to the record of `page`, behind the work queued on `stream` so far.
  virtual void write_back(const Page& page, int slot, void* stream) = 0;

  /// Lets a slot that failed be used again. If it failed writing back, that is issued once more; a
  /// failed fetch is the caller's to repeat.
  virtual void retry(int slot) = 0;

  /// Whether `slot` has failed by now, and the page whose write-back was lost if its bytes are the
  /// only good copy of one (-1 otherwise). Neither waits nor throws the slot's error.
  virtual bool failed(int slot) const = 0;
  virtual std::int64_t unsaved(int slot) const = 0;

  /// Waits for everything under way. Throws the first error of a slot that is still failed.
  virtual void drain() = 0;

  /// Milliseconds in which at least one copy was under way, since the last call of this function.
  virtual double take_busy_ms() = 0;

  /// Milliseconds that work on compute streams stood still for pages, as far as they are known and
  /// were not told before. Where the host waits instead, `await` tells.
  virtual double take_wait_ms() { return 0; }

  /// Copies and waits go to `log` as well, which outlives the mover. Before the first copy.
  virtual void log_to(IntervalLog& /*log*/) {}

  // The bytes of a slot with nothing under way. As they stand here, for slots in host memory.

  /// Fills `count` elements from byte `offset` of the slot on, behind the work queued on `stream`.
  virtual void fill(int slot, std::int64_t offset, std::int64_t count, const Stream& pattern,
                    void* /*stream*/) {
    fill_elements(slot_address(slot) + offset, count, pattern);
  }

  /// Copies bytes of the slot to or from the host, finished on return.
  virtual void peek(int slot, std::int64_t offset, std::int64_t bytes, std::byte* to) {
    std::memcpy(to, slot_address(slot) + offset, static_cast<std::size_t>(bytes));
  }
  virtual void poke(int slot, std::int64_t offset, std::int64_t bytes, const std::byte* from) {
    std::memcpy(slot_address(slot) + offset, from, static_cast<std::size_t>(bytes));
  }
};

}  // namespace hift
