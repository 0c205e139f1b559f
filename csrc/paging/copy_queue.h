// SPDX-License-Identifier: Apache-2.0
// Which copy may run now: the order that mover.h promises, and what a failure drops, as plain
// bookkeeping. It has no thread and no lock; its owner serialises the calls.
#pragma once

#include <cstdint>
#include <deque>
#include <exception>
#include <map>
#include <set>
#include <unordered_map>
#include <vector>

#include "paging/page_table.h"

namespace hift {

/// A page's record on its way into a slot or out of it.
struct Copy {
  Page page;
  int slot = 0;
  bool out = false;  // a write-back; otherwise a fetch
  bool started = false;
};

/// Every copy stands in two lines: its slot's and its page's. It may run when it is first in both.
/// Both lines are in the order of issue, so the oldest copy can always run.
class CopyQueue {
 public:
  using Ticket = std::uint64_t;

  explicit CopyQueue(int slots) : slots_(static_cast<std::size_t>(slots)) {}

  /// Adds a copy behind all others. Throws the slot's error if it has failed.
  void push(const Page& page, int slot, bool out);

  /// Whether a copy of this direction may run, and takes the oldest: it now runs.
  bool ready(bool out) const { return !ready_[out].empty(); }
  Ticket take(bool out);
  const Copy& copy(Ticket ticket) const { return copies_.at(ticket); }

  /// The error a taken copy must end with, without running: its page's write-back has failed.
  std::exception_ptr doomed(Ticket ticket) const;

  /// Ends a taken copy. With an error its slot fails, and what stands behind it there is dropped.
  void finish(Ticket ticket, std::exception_ptr error);

  /// Nothing is under way, on a slot or at all.
  bool idle(int slot) const { return slots_[slot].line.empty(); }
  bool idle() const { return copies_.empty(); }
  std::exception_ptr error(int slot) const { return slots_[slot].error; }
  std::exception_ptr first_error() const;  // the oldest of the slots that are failed now
  std::int64_t unsaved(int slot) const;

  /// Clears the slot's error and issues again the write-backs that were lost.
  void retry(int slot);

  /// Drops fetches that have not started and that nothing waits for.
  void drop_useless_fetches();

 private:
  struct Slot {
    std::deque<Ticket> line;
    std::exception_ptr error;
    std::uint64_t failed_at = 0;
    std::vector<Page> unsaved;  // write-backs of the bytes in the slot that did not reach the store
  };
  void promote(Ticket ticket);
  void remove(Ticket ticket);
  void fail(Ticket ticket, std::exception_ptr error);
  void spend(std::int64_t page);

  Ticket next_ = 0;
  std::uint64_t failures_ = 0;
  std::map<Ticket, Copy> copies_;
  std::vector<Slot> slots_;
  std::unordered_map<std::int64_t, std::deque<Ticket>> pages_;
  std::unordered_map<std::int64_t, std::exception_ptr> lost_;  // pages the store has old bytes of
  std::vector<std::exception_ptr> spent_;  // of pages that were lost and are not any more
  std::set<Ticket> ready_[2];
};

}  // namespace hift
