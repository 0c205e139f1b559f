// SPDX-License-Identifier: Apache-2.0
// The pager: which page is in which slot, and what moves next. It is single-threaded (its owner
// holds a lock) and knows bytes only. Prefetch names a group; its pages are then acquired and
// released.
#pragma once

#include <cstddef>
#include <cstdint>
#include <deque>
#include <exception>
#include <memory>
#include <set>
#include <unordered_map>
#include <vector>

#include "paging/mover.h"
#include "paging/page_table.h"
#include "paging/store.h"

namespace hift {

/// A page ready to be updated: the address of each of its streams, valid until its release.
struct PageView {
  std::byte* stream[kMaxStreams] = {};
};

struct PagerCounters {
  std::int64_t bytes_in = 0;   // fetched into slots
  std::int64_t bytes_out = 0;  // written back
  double wait_ms = 0;          // the host stood still for pages
  double transfer_ms = 0;      // at least one copy was under way
};

/// An error of a copy under way comes out of the next prefetch, acquire, write or flush, once; the
/// call after that tries the copy again. No error loses a page: what did not reach the store stays
/// in its slot, is found there by `read`, and is written back before the slot is used for another.
class Pager {
 public:
  /// With `slots` == 0 pages are updated in place, and the store must have addresses (mover may be
  /// null). Table, store and mover outlive the pager; `mover` has at least `slots` slots.
  Pager(PageTable& table, Store& store, Mover* mover, int slots);

  /// Starts bringing in the pages of `group`, in order, as far as slots are free; the rest follows
  /// as slots come free. Untouched pages are filled, not fetched; pages still in a slot are not
  /// fetched again. A prefetch that is not followed by the acquires of that group is dropped by the
  /// next prefetch. Pages of the pass before may still be held.
  void prefetch(int group);

  /// The page's streams, safe to change by work on `stream`. Prefetches the page's group first if
  /// nobody has. Pages of a group are acquired in ascending order (some may be left out), any
  /// number at once up to the number of slots. With nothing held, any page may begin a new pass.
  PageView acquire(std::int64_t page, void* stream);

  /// Ends an acquire. `dirty`: the page was changed; it becomes touched and its write-back starts.
  /// A page that was changed must be released dirty. Throws no error of a copy.
  void release(std::int64_t page, void* stream, bool dirty);

  /// Waits until every write-back has reached the store. Throws the first error, which leaves every
  /// page readable; the next flush tries again.
  void flush();

  /// Copies elements [begin, begin + count) of one stream of a group out of or into the pages,
  /// wherever they are. `fill` gives untouched pages' value. `write` touches the pages; after an
  /// error those before it are written. Neither may be called between acquire and release.
  void read(int group, int stream, std::int64_t begin, std::int64_t count, std::byte* to);
  void write(int group, int stream, std::int64_t begin, std::int64_t count, const std::byte* from);

  PagerCounters take_counters();        // since the last call
  std::int64_t resident_bytes() const;  // slots in compute memory (0 in place)
  int slots() const { return static_cast<int>(slots_.size()); }

 private:
  struct Slot {
    std::int64_t page = -1;     // whose bytes are here or are to come here
    bool loaded = false;        // they are here or on their way
    bool reserved = false;      // prefetched, its acquire is to come
    bool pinned = false;        // acquired
    bool failed = false;        // its error is known; it is retried before its next use
    std::int64_t leaving = -1;  // page whose write-back may be under way
    std::int64_t released = 0;  // when, in releases
  };
  struct Part {  // of one page, in a read or write
    const Page& page;
    int stream;
    std::int64_t offset, bytes;  // in the page's record
    std::int64_t count;          // elements
    std::int64_t done;           // bytes before it
  };
  template <class Visit>
  void for_parts(const char* what, int group, int stream, std::int64_t begin, std::int64_t count,
                 Visit visit);
  std::byte* in_place(const Page& page, int stream);
  void fill_in_place(const Page& page);
  void fill_slot(const Page& page, int slot, void* stream);
  void read_part(const Part& part, std::byte* to);
  void write_part(const Part& part, const std::byte* from);

  int find(std::int64_t page) const;
  int victim();
  void bind(std::int64_t page, int slot);
  void unbind(int slot);
  void load(int slot);
  void repair(int slot);
  void begin_write_back(const Page& page, int slot, void* stream);
  void postpone(std::int64_t page);
  void fill_ring();
  void settle();
  void remember_error();
  void throw_remembered();

  PageTable& table_;
  Store& store_;
  Mover* mover_;
  std::vector<Slot> slots_;
  std::unordered_map<std::int64_t, int> slot_of_;
  std::deque<std::int64_t> pending_;  // of the prefetch, no slot yet, ascending
  std::set<std::int64_t> held_;
  int group_ = -1;         // prefetched
  std::int64_t last_ = 0;  // acquired last in this pass
  std::int64_t releases_ = 0;
  std::exception_ptr error_;  // of a copy, not thrown yet
  std::unique_ptr<Slab> scratch_;
  std::int64_t scratch_page_ = -1;  // whose record as stored is in scratch_
  PagerCounters counters_;
};

}  // namespace hift
