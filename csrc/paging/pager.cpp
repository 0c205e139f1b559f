// SPDX-License-Identifier: Apache-2.0
// The pager's calls: the order they may come in, and what each asks of the ring. How slots are
// given, taken and saved after errors is in pager_ring.cpp.
#include "paging/pager.h"

#include <algorithm>
#include <cstring>

#include "core/check.h"

namespace hift {

Pager::Pager(PageTable& table, Store& store, Mover* mover, int slots)
    : table_(table), store_(store), mover_(mover) {
  check_argument(slots >= 0, "the number of slots must not be negative: ", slots);
  check_argument(slots == 0 || mover != nullptr, slots, " slots need a mover");
  // Pages without streams have nothing to bring anywhere.
  if (!table.streams().empty()) slots_.resize(static_cast<std::size_t>(slots));
}

void Pager::prefetch(int group) {
  const std::int64_t first = table_.first_page(group), end = table_.end_page(group);
  throw_remembered();
  group_ = group;
  last_ = first - 1;
  pending_.clear();
  if (slots_.empty()) return;
  for (Slot& slot : slots_) slot.reserved = false;
  for (std::int64_t p = first; p < end; ++p) pending_.push_back(p);
  try {
    fill_ring();
  } catch (...) {
    settle();
    throw;
  }
}

PageView Pager::acquire(std::int64_t index, void* stream) {
  const Page& page = table_.page(index);
  check_order(held_.count(index) == 0, "page ", index, " is acquired already: release it first");
  if (page.group != group_ || index <= last_) {
    check_order(held_.empty() || page.group == group_, "page ", index, " belongs to group ",
                page.group, ", but group ", group_, " was prefetched and ", held_.size(),
                " pages are held: release them, or prefetch group ", page.group, " first");
    check_order(held_.empty(), "page ", index, " comes after page ", last_,
                ": pages are acquired in ascending order while pages are held");
    prefetch(page.group);
  }
  PageView view;
  if (slots_.empty()) {
    if (!page.touched) fill_in_place(page);
    for (int s = 0; s < static_cast<int>(table_.streams().size()); ++s) {
      view.stream[s] = in_place(page, s);
    }
  } else {
    throw_remembered();
    // Pages left out give their slots up.
    for (Slot& slot : slots_) slot.reserved = slot.reserved && slot.page >= index;
    pending_.erase(pending_.begin(), std::lower_bound(pending_.begin(), pending_.end(), index));
    int slot = find(index);
    if (slot < 0) slot = victim();
    check_order(slot >= 0, "page ", index, " finds all ", slots_.size(),
                " slots held by acquired pages: release one first");
    try {
      if (slots_[slot].page != index) bind(index, slot);
      load(slot);
      // The page's bytes have come in, and those it had before have gone out of the slot, as far as
      // `stream` is concerned: the host may still have to wait for them (`leaving`).
      counters_.wait_ms += mover_->await(slot, stream);
    } catch (...) {
      settle();
      throw;
    }
    if (!page.touched) fill_slot(page, slot, stream);
    slots_[slot].pinned = true;
    slots_[slot].reserved = false;
    if (!pending_.empty() && pending_.front() == index) pending_.pop_front();
    for (int s = 0; s < static_cast<int>(table_.streams().size()); ++s) {
      view.stream[s] = mover_->slot_address(slot) + table_.stream_offset(page, s);
    }
  }
  held_.insert(index);
  last_ = index;
  return view;
}

void Pager::release(std::int64_t index, void* stream, bool dirty) {
  const Page& page = table_.page(index);
  check_order(held_.count(index) != 0, "page ", index,
              " is not acquired, so it cannot be released");
  if (!slots_.empty()) {
    const int slot = find(index);
    // Queued before anything may claim the slot: the slot's next page comes in behind it.
    if (dirty) begin_write_back(page, slot, stream);
    slots_[slot].pinned = false;
    slots_[slot].released = ++releases_;
  }
  if (dirty) table_.touch(index);
  held_.erase(index);
  if (slots_.empty()) return;
  try {
    fill_ring();
  } catch (...) {
    remember_error();
  }
}

void Pager::flush() {
  if (slots_.empty()) return;
  throw_remembered();
  try {
    for (int s = 0; s < slots(); ++s) {
      if (slots_[s].failed) repair(s);
    }
    mover_->drain();
  } catch (...) {
    settle();
    throw;
  }
  for (Slot& slot : slots_) slot.leaving = -1;
}

template <class Visit>
void Pager::for_parts(const char* what, int group, int stream, std::int64_t begin,
                      std::int64_t count, Visit visit) {
  const std::int64_t elements = table_.elements(group);
  check_argument(stream >= 0 && stream < static_cast<int>(table_.streams().size()), "stream ",
                 stream, " is not one of ", table_.streams().size());
  check_argument(begin >= 0 && count >= 0 && begin <= elements && count <= elements - begin,
                 "elements [", begin, ", ", begin, " + ", count, ") are outside group ", group,
                 "'s ", elements);
  check_order(held_.empty(), "a ", what, " of elements cannot come between acquire and release; ",
              held_.size(), " pages are held");
  const Stream& values = table_.streams()[stream];
  check_argument(begin % values.run == 0, "element ", begin, " does not begin a run of ",
                 values.run);
  for (std::int64_t at = begin; at < begin + count;) {
    const Page& page = table_.page(table_.page_of(group, at));
    const std::int64_t n = std::min(page.begin + page.count, begin + count) - at;
    visit(Part{page, stream, table_.stream_offset(page, stream) + values.bytes(at - page.begin),
               values.bytes(n), n, values.bytes(at - begin)});
    at += n;
  }
}

void Pager::read(int group, int stream, std::int64_t begin, std::int64_t count, std::byte* to) {
  for_parts("read", group, stream, begin, count, [&](const Part& part) {
    if (!part.page.touched) {
      fill_elements(to + part.done, part.count, table_.streams()[stream]);
    } else if (slots_.empty()) {
      const std::int64_t within = part.offset - table_.stream_offset(part.page, stream);
      std::memcpy(to + part.done, in_place(part.page, stream) + within,
                  static_cast<std::size_t>(part.bytes));
    } else {
      read_part(part, to + part.done);
    }
  });
}

void Pager::write(int group, int stream, std::int64_t begin, std::int64_t count,
                  const std::byte* from) {
  for_parts("write", group, stream, begin, count, [&](const Part& part) {
    if (slots_.empty()) {
      if (!part.page.touched) fill_in_place(part.page);
      const std::int64_t within = part.offset - table_.stream_offset(part.page, stream);
      std::memcpy(in_place(part.page, stream) + within, from + part.done,
                  static_cast<std::size_t>(part.bytes));
      table_.touch(part.page.index);
    } else {
      write_part(part, from + part.done);
    }
  });
}

std::byte* Pager::in_place(const Page& page, int stream) {
  std::byte* address = store_.address(table_, page, stream);
  check_argument(address != nullptr, "pages of ", store_.description(),
                 " have no address and cannot be updated in place: they need a ring of slots");
  return address;
}

void Pager::fill_in_place(const Page& page) {
  for (int s = 0; s < static_cast<int>(table_.streams().size()); ++s) {
    // The system gives memory zeroed: the first touch of a fresh page is left to the update, which
    // spreads it over its threads.
    if (page.fresh && table_.streams()[s].fill == 0 && store_.zeroed()) continue;
    fill_elements(in_place(page, s), page.extent, table_.streams()[s]);
  }
}

PagerCounters Pager::take_counters() {
  PagerCounters taken = counters_;
  counters_ = {};
  if (!slots_.empty()) {
    taken.transfer_ms = mover_->take_busy_ms();
    taken.wait_ms += mover_->take_wait_ms();
  }
  return taken;
}

std::int64_t Pager::resident_bytes() const {
  return slots_.empty() ? 0 : slots() * mover_->slot_bytes();
}

}  // namespace hift
