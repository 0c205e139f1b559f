// SPDX-License-Identifier: Apache-2.0
// Two lines for every copy, its slot's and its page's, and what happens to them when a copy fails:
// the slot's line is dropped, the page's goes on and meets `doomed`.
#include "paging/copy_queue.h"

#include <algorithm>
#include <utility>

namespace hift {

void CopyQueue::push(const Page& page, int slot, bool out) {
  if (slots_[slot].error) std::rethrow_exception(slots_[slot].error);
  spent_.clear();
  if (out) {
    // Newer bytes of the page are on their way: a lost write-back of older ones must not follow.
    for (Slot& other : slots_) {
      auto& pages = other.unsaved;
      pages.erase(std::remove_if(pages.begin(), pages.end(),
                                 [&](const Page& old) { return old.index == page.index; }),
                  pages.end());
    }
  }
  const Ticket ticket = next_++;
  copies_.emplace(ticket, Copy{page, slot, out});
  slots_[slot].line.push_back(ticket);
  pages_[page.index].push_back(ticket);
  promote(ticket);
}

void CopyQueue::promote(Ticket ticket) {
  const Copy& c = copies_.at(ticket);
  // First in the slot's line: the slot's earlier bytes have gone out, or have come in.
  // First in the page's line: the store holds the page's last write-back, and nobody reads it.
  if (slots_[c.slot].line.front() == ticket && pages_.at(c.page.index).front() == ticket) {
    ready_[c.out].insert(ticket);
  }
}

void CopyQueue::remove(Ticket ticket) {
  const Copy c = copies_.at(ticket);
  copies_.erase(ticket);
  ready_[c.out].erase(ticket);
  const auto leave = [&](std::deque<Ticket>& line) {
    const bool first = line.front() == ticket;
    line.erase(std::find(line.begin(), line.end(), ticket));
    // Only who has just become first can be new to run: an older first may be running already.
    if (first && !line.empty()) promote(line.front());
  };
  leave(slots_[c.slot].line);
  leave(pages_.at(c.page.index));
  if (pages_.at(c.page.index).empty()) pages_.erase(c.page.index);
}

CopyQueue::Ticket CopyQueue::take(bool out) {
  const Ticket ticket = *ready_[out].begin();
  ready_[out].erase(ready_[out].begin());
  copies_.at(ticket).started = true;
  return ticket;
}

std::exception_ptr CopyQueue::doomed(Ticket ticket) const {
  const Copy& c = copies_.at(ticket);
  const auto lost = lost_.find(c.page.index);
  return c.out || lost == lost_.end() ? nullptr : lost->second;
}

void CopyQueue::finish(Ticket ticket, std::exception_ptr error) {
  if (error) {
    fail(ticket, std::move(error));
  } else if (copies_.at(ticket).out) {
    spend(copies_.at(ticket).page.index);
  }
  remove(ticket);
}

/// Forgets a page's error, but leaves its end to the next `push`: copies end on threads of their
/// own, while the caller may still be looking at the exception. The count of its owners would
/// protect it, but race detectors cannot see that.
void CopyQueue::spend(std::int64_t page) {
  const auto lost = lost_.find(page);
  if (lost == lost_.end()) return;
  spent_.push_back(std::move(lost->second));
  lost_.erase(lost);
}

void CopyQueue::fail(Ticket ticket, std::exception_ptr error) {
  Slot& slot = slots_[copies_.at(ticket).slot];
  slot.error = error;
  slot.failed_at = ++failures_;
  const std::vector<Ticket> line(slot.line.begin(), slot.line.end());
  for (const Ticket t : line) {
    const Copy& c = copies_.at(t);
    // A write-back behind a failed one would have written the same bytes. Behind a fetch nothing
    // is lost: the store has what the slot would have been given.
    if (!c.out) break;
    spend(c.page.index);
    lost_[c.page.index] = error;
    const std::deque<Ticket>& others = pages_.at(c.page.index);
    const bool newer = std::any_of(others.begin(), others.end(), [&](Ticket other) {
      return other > t && copies_.at(other).out && copies_.at(other).slot != c.slot;
    });
    if (!newer) slot.unsaved.push_back(c.page);
  }
  // From the back, so that none becomes first in the slot's line on its way out.
  for (auto t = line.rbegin(); *t != ticket; ++t) remove(*t);
}

std::exception_ptr CopyQueue::first_error() const {
  const Slot* first = nullptr;
  for (const Slot& slot : slots_) {
    if (slot.error && (first == nullptr || slot.failed_at < first->failed_at)) first = &slot;
  }
  return first == nullptr ? nullptr : first->error;
}

std::int64_t CopyQueue::unsaved(int slot) const {
  return slots_[slot].unsaved.empty() ? -1 : slots_[slot].unsaved.front().index;
}

void CopyQueue::retry(int slot) {
  if (!slots_[slot].error) return;
  slots_[slot].error = nullptr;
  const std::vector<Page> pages = std::exchange(slots_[slot].unsaved, {});
  for (const Page& page : pages) push(page, slot, true);
}

void CopyQueue::drop_useless_fetches() {
  for (Slot& slot : slots_) {
    while (!slot.line.empty()) {
      const Copy& last = copies_.at(slot.line.back());
      if (last.out || last.started) break;
      remove(slot.line.back());
    }
  }
}

}  // namespace hift
