// SPDX-License-Identifier: Apache-2.0
// The ring's books: a slot is given to a page, loaded, reserved, pinned, released and taken again.
// After an error `settle` sets them right: a page that did not reach the store keeps its slot.
#include <algorithm>
#include <utility>

#include "core/check.h"
#include "paging/pager.h"

namespace hift {

int Pager::find(std::int64_t page) const {
  const auto found = slot_of_.find(page);
  return found == slot_of_.end() ? -1 : found->second;
}

/// A slot to give away: an empty one, else the one released longest ago. If all that are not held
/// wait for their acquire, the one whose turn is last gives way. -1: all are held.
int Pager::victim() {
  int best = -1;
  const auto rank = [&](const Slot& s) {
    return std::make_pair(s.reserved, s.reserved ? -s.page : s.page < 0 ? -1 : s.released);
  };
  for (int s = 0; s < slots(); ++s) {
    if (!slots_[s].pinned && (best < 0 || rank(slots_[s]) < rank(slots_[best]))) best = s;
  }
  if (best >= 0 && slots_[best].reserved) {
    slots_[best].reserved = false;
    postpone(slots_[best].page);
  }
  return best;
}

void Pager::postpone(std::int64_t page) {
  if (table_.page(page).group != group_ || page <= last_) return;
  const auto at = std::lower_bound(pending_.begin(), pending_.end(), page);
  if (at == pending_.end() || *at != page) pending_.insert(at, page);
}

void Pager::unbind(int slot) {
  Slot& s = slots_[slot];
  if (s.page < 0) return;
  slot_of_.erase(s.page);
  if (s.reserved) postpone(s.page);
  s.page = -1;
  s.loaded = s.reserved = false;
}

void Pager::bind(std::int64_t page, int slot) {
  unbind(slot);
  slots_[slot].page = page;
  slot_of_[page] = slot;
}

/// Sees to it that the slot's page is in the slot or on its way. What a failed slot did not write
/// back goes first; if it fails again, `settle` gives it the slot again.
void Pager::load(int slot) {
  Slot& s = slots_[slot];
  if (s.failed) repair(slot);
  const Page& page = table_.page(s.page);
  if (s.loaded || !page.touched) return;
  mover_->fetch(page, slot);
  s.loaded = true;
  counters_.bytes_in += table_.record_bytes(page);
}

/// Makes a failed slot usable: what it did not write back is on its way again.
void Pager::repair(int slot) {
  const std::int64_t unsaved = mover_->unsaved(slot);
  mover_->retry(slot);
  slots_[slot].failed = false;
  if (unsaved < 0) return;
  slots_[slot].leaving = unsaved;
  counters_.bytes_out += table_.record_bytes(table_.page(unsaved));
}

void Pager::begin_write_back(const Page& page, int slot, void* stream) {
  if (scratch_page_ == page.index) scratch_page_ = -1;
  mover_->write_back(page, slot, stream);
  slots_[slot].leaving = page.index;
  counters_.bytes_out += table_.record_bytes(page);
}

void Pager::fill_slot(const Page& page, int slot, void* stream) {
  for (int s = 0; s < static_cast<int>(table_.streams().size()); ++s) {
    mover_->fill(slot, table_.stream_offset(page, s), page.extent, table_.streams()[s], stream);
  }
  slots_[slot].loaded = true;
}

/// Gives the free slots to the pages whose turn is next. Pages that are in a slot keep it.
void Pager::fill_ring() {
  auto free = std::count_if(slots_.begin(), slots_.end(),
                            [](const Slot& s) { return !s.pinned && !s.reserved; });
  std::vector<std::int64_t> next;
  for (auto p = pending_.begin(); p != pending_.end() && free > 0; ++p) {
    const int slot = find(*p);
    if (slot >= 0 && slots_[slot].pinned) continue;  // held since the pass before
    next.push_back(*p);
    --free;
  }
  // First those that are here, so that none is given away for one before it.
  for (const std::int64_t page : next) {
    if (const int slot = find(page); slot >= 0) slots_[slot].reserved = true;
  }
  for (const std::int64_t page : next) {
    int slot = find(page);
    if (slot < 0) {
      slot = victim();
      bind(page, slot);
      slots_[slot].reserved = true;
    }
    load(slot);
    // Not before: after an error the page is still to come.
    pending_.erase(std::find(pending_.begin(), pending_.end(), page));
  }
}

/// Sets the books right after an error: asks every slot what became of it.
void Pager::settle() {
  for (int s = 0; s < slots(); ++s) {
    Slot& slot = slots_[s];
    if (!mover_->failed(s)) continue;
    slot.failed = true;
    slot.leaving = -1;
    const std::int64_t unsaved = mover_->unsaved(s);
    if (unsaved < 0) {
      slot.loaded = false;
    } else {
      // The slot holds this page's only good bytes, whatever it was to hold next.
      if (slot.page != unsaved) {
        if (const int other = find(unsaved); other >= 0) unbind(other);
        unbind(s);
        slot.page = unsaved;
        slot_of_[unsaved] = s;
      }
      slot.loaded = true;
    }
  }
}

void Pager::remember_error() {
  const std::exception_ptr error = std::current_exception();
  settle();
  if (!error_) error_ = error;
}

void Pager::throw_remembered() {
  if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
}

void Pager::read_part(const Part& part, std::byte* to) {
  const std::int64_t index = part.page.index;
  // Each turn but the last finds one more slot failed.
  for (;;) {
    const int slot = find(index);
    try {
      if (slot >= 0 && slots_[slot].loaded) {
        // The page is on its way in. A failed slot has stopped; its bytes are good.
        if (!slots_[slot].failed) mover_->wait(slot);
        mover_->peek(slot, part.offset, part.bytes, to);
        return;
      }
      for (int s = 0; s < slots(); ++s) {
        // The page's last bytes are on their way out of a slot that has been given away.
        if (slots_[s].leaving == index) mover_->wait(s);
      }
      break;
    } catch (...) {
      // Not this call's error if the page's bytes are good elsewhere.
      remember_error();
    }
  }
  if (scratch_ == nullptr || scratch_->bytes() < table_.record_bytes(part.page)) {
    scratch_page_ = -1;
    scratch_ = std::make_unique<Slab>(table_.max_record_bytes());
  }
  // A record is read once for all its streams and small items, if they are asked for in turn.
  if (scratch_page_ != index) {
    scratch_page_ = -1;
    store_.read(table_, part.page, scratch_->data());
    scratch_page_ = index;
  }
  std::memcpy(to, scratch_->data() + part.offset, static_cast<std::size_t>(part.bytes));
}

void Pager::write_part(const Part& part, const std::byte* from) {
  const std::int64_t index = part.page.index;
  int slot = find(index);
  if (slot < 0) slot = victim();
  try {
    // Through a slot, never straight to the store: a write that fails halfway leaves the page whole
    // in its slot.
    if (slots_[slot].page != index) bind(index, slot);
    load(slot);
    // The page has come in, and the copies out of the slot do not see half of the change.
    mover_->wait(slot);
    slots_[slot].leaving = -1;
    if (!part.page.touched) fill_slot(part.page, slot, nullptr);
    mover_->poke(slot, part.offset, part.bytes, from);
    begin_write_back(part.page, slot, nullptr);
  } catch (...) {
    settle();
    throw;
  }
  table_.touch(index);
  if (!slots_[slot].reserved) slots_[slot].released = ++releases_;
}

}  // namespace hift
