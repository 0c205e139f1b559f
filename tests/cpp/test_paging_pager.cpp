// SPDX-License-Identifier: Apache-2.0
// The pager, call by call: what moves when, what waits for what, which orders are refused. Copies
// stop at a gate, so that each wait that is missing shows as wrong bytes.
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "paging/file_store.h"
#include "paging/host_mover.h"
#include "paging/pager.h"
#include "paging_stores.h"

using namespace hift;
using namespace hift_test;
using Order = std::logic_error;
using Bad = std::invalid_argument;

namespace {

constexpr std::int64_t kPage = 1024;  // elements
constexpr std::uint32_t kFill = 0x01020304;

/// Two streams (zero, and a pattern); groups of `pages` pages each. Every element of a page that
/// was touched holds the page's value.
struct Rig {
  explicit Rig(int slots, std::vector<int> pages = {4, 3})
      : table({{4, 0}, {2, kFill}}, 6 * kPage), faults(ram), gate(faults) {
    for (const int n : pages) table.add_group(n * kPage - 10);
    gate.grow(table);
    if (slots > 0) {
      mover = std::make_unique<HostMover>(gate, table, slots, table.max_record_bytes(), 2, 2);
    }
    store = slots > 0 ? static_cast<Store*>(&gate) : &ram;
    pager = std::make_unique<Pager>(table, *store, mover.get(), slots);
  }
  ~Rig() {
    gate.open();
    pager.reset();
    mover.reset();
  }
  void set(const PageView& view, std::int64_t p, int value) {
    std::memset(view.stream[0], value, static_cast<std::size_t>(table.page(p).count * 4));
    std::memset(view.stream[1], value, static_cast<std::size_t>(table.page(p).count * 2));
  }
  bool all(const std::byte* bytes, std::int64_t n, int value) {
    return std::all_of(bytes, bytes + n, [&](std::byte b) { return b == std::byte(value); });
  }
  bool has(const PageView& view, std::int64_t p, int value) {
    return all(view.stream[0], table.page(p).count * 4, value) &&
           all(view.stream[1], table.page(p).count * 2, value);
  }
  bool is_fresh(const PageView& view, std::int64_t p) {
    bool fresh = all(view.stream[0], table.page(p).count * 4, 0);
    for (std::int64_t i = 0; i < table.page(p).count; ++i) {
      fresh = fresh && view.stream[1][2 * i] == std::byte{4} &&
              view.stream[1][2 * i + 1] == std::byte{3};
    }
    return fresh;
  }
  bool store_has(std::int64_t p, int value) {
    return all(ram.address(table, table.page(p), 0), table.page(p).count * 4, value) &&
           all(ram.address(table, table.page(p), 1), table.page(p).count * 2, value);
  }
  /// Gives a page a value, through acquire and release.
  void update(std::int64_t p, int value) {
    set(pager->acquire(p, nullptr), p, value);
    pager->release(p, nullptr, true);
  }
  /// Page p gets value p + 1, all write-backs done, the log and the counters empty.
  void update_all() {
    for (std::int64_t p = 0; p < table.pages(); ++p) update(p, static_cast<int>(p) + 1);
    pager->flush();
    gate.take_events();
    pager->take_counters();
  }
  bool reads(std::int64_t p, int value) {
    const Page& page = table.page(p);
    std::vector<std::byte> got(page.count * 4);
    pager->read(page.group, 0, page.begin, page.count, got.data());
    const bool first = all(got.data(), page.count * 4, value);
    pager->read(page.group, 1, page.begin, page.count, got.data());
    return first && all(got.data(), page.count * 2, value);
  }
  void writes(std::int64_t p, int value) {
    const Page& page = table.page(p);
    const std::vector<std::byte> from(page.count * 4, std::byte(value));
    pager->write(page.group, 0, page.begin, page.count, from.data());
    pager->write(page.group, 1, page.begin, page.count, from.data());
  }
  std::int64_t record() { return table.record_bytes(table.page(0)); }

  PageTable table;
  RamStore ram;
  FaultStore faults;
  GateStore gate;
  Store* store;
  std::unique_ptr<HostMover> mover;
  std::unique_ptr<Pager> pager;
};

}  // namespace

TEST(pages_keep_what_they_were_given) {
  for (const int slots : {0, 1, 2, 3, 7}) {
    Rig rig(slots);
    for (int round = 0; round < 3; ++round) {
      for (int g = 0; g < 2; ++g) {
        rig.pager->prefetch(g);
        for (std::int64_t p = rig.table.first_page(g); p < rig.table.end_page(g); ++p) {
          const PageView view = rig.pager->acquire(p, nullptr);
          CHECK(round == 0 ? rig.is_fresh(view, p) : rig.has(view, p, 10 * round + int(p)),
                "slots ", slots, " round ", round, " page ", p);
          rig.set(view, p, 10 * (round + 1) + static_cast<int>(p));
          rig.pager->release(p, nullptr, true);
        }
      }
    }
    rig.pager->flush();
    for (std::int64_t p = 0; p < 7; ++p) CHECK(rig.store_has(p, 30 + static_cast<int>(p)));
  }
}

TEST(prefetch_returns_at_once_and_fills_the_free_slots) {
  Rig rig(2);
  rig.update_all();
  rig.gate.shut();
  rig.pager->prefetch(0);
  CHECK(rig.gate.comes('r', 0) && rig.gate.comes('r', 1));
  CHECK(rig.gate.stays_away('r', 2), "a reserved slot was given away");
}

TEST(acquire_waits_for_its_page) {
  Rig rig(3);
  rig.update_all();
  rig.pager->prefetch(1);
  rig.pager->flush();
  rig.gate.shut();
  rig.pager->prefetch(0);
  {
    const Later later([&] { rig.gate.open(); });
    CHECK(rig.has(rig.pager->acquire(0, nullptr), 0, 1));
  }
  CHECK(rig.pager->take_counters().wait_ms > 20);
}

TEST(release_sends_the_page_out_and_asks_for_the_next) {
  Rig rig(2);
  rig.update_all();
  rig.pager->prefetch(0);
  PageView view = rig.pager->acquire(0, nullptr);
  rig.set(view, 0, 50);
  rig.pager->acquire(1, nullptr);
  rig.gate.take_events();
  rig.gate.shut();
  rig.pager->release(0, nullptr, true);
  CHECK(rig.gate.comes('w', 0));
  CHECK(rig.gate.stays_away('r', 2), "page 2 overwrites page 0 on its way out");
  rig.gate.open();
  CHECK(rig.gate.comes('R', 2), "nobody asked for page 2");
  CHECK(rig.store_has(0, 50));
  rig.pager->release(1, nullptr, false);
  CHECK(rig.gate.comes('R', 3));
  CHECK(!rig.gate.seen('w', 1), "a clean page was written back");
}

TEST(a_cached_page_is_not_changed_on_its_way_out) {
  Rig rig(4);
  rig.update_all();
  rig.pager->prefetch(0);
  rig.pager->flush();
  rig.gate.shut();
  rig.update(0, 71);
  CHECK(rig.gate.comes('w', 0));
  {
    const Later later([&] { rig.gate.open(); });
    rig.update(0, 72);
  }
  rig.pager->flush();
  const auto written = rig.gate.written();
  CHECK(written.size() == 2 && rig.all(written[0].data(), kPage * 6, 71) &&
            rig.all(written[1].data(), kPage * 6, 72),
        "the write-back carried the next update");
}

TEST(an_untouched_page_is_filled_after_its_slot_is_free) {
  Rig rig(1);
  rig.gate.shut();
  rig.pager->prefetch(0);
  rig.update(0, 5);  // nothing to fetch: the gate is not in the way
  CHECK(rig.gate.comes('w', 0));
  PageView view;
  {
    const Later later([&] { rig.gate.open(); });
    view = rig.pager->acquire(1, nullptr);
  }
  CHECK(rig.is_fresh(view, 1));
  CHECK(rig.store_has(0, 5), "the fill value went out in the page's place");
  CHECK(rig.gate.total('r') == 0, "an untouched page was fetched");
  rig.pager->release(1, nullptr, false);
}

TEST(prefetch_of_untouched_pages_does_not_wait) {
  Rig rig(2);
  rig.pager->prefetch(0);
  rig.gate.shut();
  rig.update(0, 5);
  rig.update(1, 6);
  rig.pager->prefetch(1);  // would hang here
  CHECK(rig.gate.comes('w', 1));
}

TEST(pages_in_a_slot_are_not_fetched_again) {
  Rig rig(7);
  rig.update_all();
  for (int g : {0, 1, 0}) {
    rig.pager->prefetch(g);
    for (std::int64_t p = rig.table.first_page(g); p < rig.table.end_page(g); ++p) rig.update(p, 9);
  }
  rig.pager->flush();
  CHECK(rig.gate.total('r') == 0);
  const PagerCounters counters = rig.pager->take_counters();
  CHECK(counters.bytes_in == 0 && counters.bytes_out == 11 * rig.record(), counters.bytes_out);
}

TEST(the_page_released_longest_ago_gives_way) {
  Rig rig(3, {1, 1, 1, 1, 1});
  rig.update_all();  // 2, 3, 4 are in the slots
  rig.update(2, 30);
  rig.update(0, 31);  // takes 3's
  rig.pager->flush();
  rig.gate.take_events();
  rig.update(4, 32);
  rig.update(2, 33);
  CHECK(rig.gate.total('r') == 0);
  rig.update(3, 34);  // takes 0's
  rig.update(4, 35);
  rig.update(2, 36);
  CHECK(rig.gate.seen('r', 3) && rig.gate.total('r') == 1);
}

TEST(a_cached_page_of_the_group_is_not_given_away_for_one_before_it) {
  Rig rig(3, {3, 1, 1});
  rig.update_all();
  rig.pager->prefetch(0);
  rig.pager->acquire(2, nullptr);  // 2 is here, released before all others
  rig.pager->release(2, nullptr, false);
  rig.update(3, 9);
  rig.update(4, 9);
  rig.pager->flush();
  rig.gate.take_events();
  rig.pager->prefetch(0);
  rig.pager->flush();
  CHECK(rig.gate.seen('r', 0) && rig.gate.seen('r', 1) && !rig.gate.seen('r', 2));
}

TEST(a_prefetch_that_is_not_used_is_dropped) {
  Rig rig(2);
  rig.update_all();
  rig.pager->prefetch(0);
  rig.pager->flush();
  rig.gate.take_events();
  rig.pager->prefetch(1);
  CHECK(rig.gate.comes('R', 4) && rig.gate.comes('R', 5), "its slots are still kept");
  for (std::int64_t p = 4; p < 7; ++p) {
    CHECK(rig.has(rig.pager->acquire(p, nullptr), p, static_cast<int>(p) + 1));
    rig.pager->release(p, nullptr, false);
  }
  for (std::int64_t p = 0; p < 4; ++p) {
    CHECK(rig.has(rig.pager->acquire(p, nullptr), p, static_cast<int>(p) + 1));
    rig.pager->release(p, nullptr, false);
  }
}

TEST(pages_may_be_left_out) {
  Rig rig(1);
  rig.update_all();
  rig.pager->prefetch(0);
  for (const std::int64_t p : {1, 3}) {
    CHECK(rig.has(rig.pager->acquire(p, nullptr), p, static_cast<int>(p) + 1));
    rig.pager->release(p, nullptr, false);
  }
}

TEST(pages_left_out_give_their_slots_up) {
  Rig rig(2);
  rig.update_all();
  rig.pager->prefetch(0);
  rig.pager->acquire(1, nullptr);
  rig.pager->release(1, nullptr, false);
  CHECK(rig.gate.comes('R', 2) && rig.gate.comes('R', 3));
}

TEST(a_group_is_prefetched_while_the_last_page_is_held) {
  for (const int slots : {1, 2, 4, 7}) {
    Rig rig(slots, {3});
    rig.update_all();
    for (int round = 0; round < 3; ++round) {
      for (std::int64_t p = 0; p < 3; ++p) {
        const PageView view = rig.pager->acquire(p, nullptr);
        CHECK(rig.has(view, p, round == 0 ? static_cast<int>(p) + 1 : 40 + round));
        rig.set(view, p, 41 + round);
        if (p == 2) rig.pager->prefetch(0);
        rig.pager->release(p, nullptr, true);
      }
    }
  }
}

TEST(a_prefetch_beside_held_pages_counts_the_slots_that_are_free) {
  Rig rig(3, {5, 2});
  rig.update_all();
  rig.pager->acquire(0, nullptr);
  rig.pager->prefetch(1);  // takes the slots of 1 and 2
  rig.pager->flush();
  rig.gate.take_events();
  rig.pager->prefetch(0);
  CHECK(rig.gate.comes('R', 1) && rig.gate.comes('R', 2));
  rig.pager->release(0, nullptr, false);
  CHECK(rig.gate.stays_away('r', 3), "page 0 is to come again and keeps its slot");
}

TEST(a_page_that_gave_way_to_a_write_is_asked_for_again) {
  Rig rig(2);
  rig.update_all();
  rig.pager->prefetch(0);
  rig.pager->flush();
  rig.writes(5, 9);
  rig.gate.take_events();
  rig.pager->acquire(0, nullptr);
  rig.pager->release(0, nullptr, false);
  CHECK(rig.gate.comes('R', 1) && rig.gate.comes('R', 2));
  CHECK(rig.gate.stays_away('r', 3));
  Rig one(1);
  one.update_all();
  one.pager->prefetch(0);
  one.writes(5, 9);
  one.gate.take_events();
  one.pager->acquire(0, nullptr);
  one.pager->release(0, nullptr, false);
  CHECK(one.gate.comes('R', 1), "page 0 keeps the slot after its turn");
}

TEST(several_pages_are_held_up_to_the_slots) {
  for (const int slots : {1, 2, 3}) {
    Rig rig(slots);
    rig.update_all();
    rig.pager->prefetch(0);
    std::vector<PageView> views;
    for (std::int64_t p = 0; p < slots; ++p) views.push_back(rig.pager->acquire(p, nullptr));
    CHECK_THROWS(Order, "slots held", rig.pager->acquire(slots, nullptr));
    for (std::int64_t p = 0; p < slots; ++p) CHECK(rig.has(views[p], p, static_cast<int>(p) + 1));
    rig.pager->release(slots - 1, nullptr, false);
    CHECK(rig.has(rig.pager->acquire(slots, nullptr), slots, slots + 1));
    rig.pager->release(slots, nullptr, false);
    for (std::int64_t p = 0; p < slots - 1; ++p) rig.pager->release(p, nullptr, false);
  }
}

TEST(illegal_orders) {
  for (const int slots : {0, 3}) {
    Rig rig(slots);
    std::byte bytes[8] = {};
    CHECK_THROWS(Order, "not acquired", rig.pager->release(0, nullptr, true));
    rig.pager->prefetch(0);
    rig.pager->acquire(1, nullptr);
    CHECK_THROWS(Order, "acquired already", rig.pager->acquire(1, nullptr));
    CHECK_THROWS(Order, "ascending", rig.pager->acquire(0, nullptr));
    CHECK_THROWS(Order, "belongs to group 1", rig.pager->acquire(4, nullptr));
    CHECK_THROWS(Order, "not acquired", rig.pager->release(2, nullptr, true));
    CHECK_THROWS(Order, "between acquire and release", rig.pager->read(0, 0, 0, 1, bytes));
    CHECK_THROWS(Order, "between acquire and release", rig.pager->write(0, 0, 0, 1, bytes));
    CHECK(!rig.table.page(2).touched && !rig.table.page(0).touched);
    rig.pager->release(1, nullptr, true);
    CHECK_THROWS(Order, "not acquired", rig.pager->release(1, nullptr, true));
    rig.pager->acquire(0, nullptr);  // nothing held: a new pass
    rig.pager->prefetch(1);
    CHECK_THROWS(Order, "belongs to group 0", rig.pager->acquire(2, nullptr));
    rig.pager->acquire(4, nullptr);  // the group that was prefetched meanwhile
    rig.pager->release(0, nullptr, false);
    rig.pager->release(4, nullptr, false);
  }
}

TEST(bad_ranges) {
  for (const int slots : {0, 2}) {
    Rig rig(slots);
    std::byte bytes[8] = {};
    CHECK_THROWS(Bad, "group 2", rig.pager->prefetch(2));
    CHECK_THROWS(Bad, "page 7", rig.pager->acquire(7, nullptr));
    CHECK_THROWS(Bad, "page -1", rig.pager->release(-1, nullptr, true));
    CHECK_THROWS(Bad, "stream 2", rig.pager->read(0, 2, 0, 1, bytes));
    CHECK_THROWS(Bad, "group -1", rig.pager->read(-1, 0, 0, 1, bytes));
    const std::int64_t n = rig.table.elements(0);
    CHECK_THROWS(Bad, "outside", rig.pager->read(0, 0, n, 1, bytes));
    CHECK_THROWS(Bad, "outside", rig.pager->write(0, 0, -1, 1, bytes));
    CHECK_THROWS(Bad, "outside", rig.pager->write(0, 0, 0, -1, bytes));
    rig.pager->read(0, 0, n, 0, nullptr);
  }
  Rig rig(1);
  CHECK_THROWS(Bad, "mover", Pager(rig.table, rig.ram, nullptr, 1));
  CHECK_THROWS(Bad, "negative", Pager(rig.table, rig.ram, nullptr, -1));
  Pager no_addresses(rig.table, rig.gate, nullptr, 0);
  CHECK_THROWS(Bad, "in place", no_addresses.acquire(0, nullptr));
}

TEST(flush_waits_for_write_backs) {
  Rig rig(2);
  rig.pager->prefetch(0);
  rig.gate.shut();
  rig.update(0, 80);
  {
    const Later later([&] { rig.gate.open(); });
    rig.pager->flush();
  }
  CHECK(rig.store_has(0, 80));
}

TEST(reads_find_pages_wherever_they_are) {
  Rig rig(1);
  rig.update_all();
  rig.pager->prefetch(0);
  rig.pager->flush();
  // On its way in.
  rig.pager->prefetch(1);
  rig.pager->flush();
  rig.gate.shut();
  rig.pager->prefetch(0);
  {
    const Later later([&] { rig.gate.open(); });
    CHECK(rig.reads(0, 1), "read before it came");
  }
  // On its way out of a slot that has been given away.
  const PageView view = rig.pager->acquire(0, nullptr);
  rig.set(view, 0, 90);
  rig.gate.shut("w");
  rig.pager->release(0, nullptr, true);
  {
    const Later later([&] { rig.gate.open(); });
    CHECK(rig.reads(0, 90), "read before it was written back");
  }
  // In the store, and never touched.
  CHECK(rig.reads(5, 6));
  rig.table.forget(5);
  CHECK(rig.reads(5, 6) == false);
  std::vector<std::byte> got(8);
  rig.pager->read(1, 1, kPage, 4, got.data());
  for (int i = 0; i < 4; ++i) CHECK(got[2 * i] == std::byte{4} && got[2 * i + 1] == std::byte{3});
}

TEST(writes_find_pages_wherever_they_are) {
  for (const int slots : {1, 2, 7}) {
    // On its way in.
    Rig rig(slots);
    rig.update_all();
    rig.pager->prefetch(1);
    rig.pager->flush();
    rig.gate.shut();
    rig.pager->prefetch(0);
    {
      const Later later([&] { rig.gate.open(); });
      rig.writes(0, 91);
    }
    CHECK(rig.reads(0, 91), "the fetch came over the write");
    rig.pager->flush();
    CHECK(rig.store_has(0, 91), "slot and store differ");
    CHECK(rig.has(rig.pager->acquire(0, nullptr), 0, 91));
    // On its way out, in its slot or after it.
    rig.pager->release(0, nullptr, false);
    rig.pager->flush();
    rig.gate.shut();
    rig.pager->prefetch(0);
    PageView view;
    {
      const Later later([&] { rig.gate.open(); }, 10);
      view = rig.pager->acquire(0, nullptr);
    }
    rig.set(view, 0, 92);
    rig.gate.take_events();
    rig.gate.shut();
    rig.pager->release(0, nullptr, true);
    CHECK(rig.gate.comes('w', 0));
    {
      const Later later([&] { rig.gate.open(); });
      rig.writes(0, 93);
    }
    CHECK(rig.reads(0, 93));
    rig.pager->flush();
    CHECK(rig.store_has(0, 93));
    // In the store, part of an untouched page, all of an untouched page.
    rig.writes(6, 94);
    rig.table.forget(5);
    const std::uint32_t one = 0x5a5a5a5a;
    rig.pager->write(1, 0, kPage + 3, 1, reinterpret_cast<const std::byte*>(&one));
    CHECK(rig.table.page(5).touched);
    CHECK(rig.reads(6, 94));
    std::vector<std::byte> got(kPage * 4);
    rig.pager->read(1, 0, kPage, kPage, got.data());
    CHECK(rig.all(got.data(), 12, 0) && rig.all(got.data() + 12, 4, 0x5a) &&
          rig.all(got.data() + 16, kPage * 4 - 16, 0));
    rig.pager->read(1, 1, kPage, kPage, got.data());
    CHECK(got[0] == std::byte{4} && got[1] == std::byte{3} && got[2047] == std::byte{3});
    for (const std::int64_t p : {1, 2, 3, 4}) CHECK(rig.reads(p, static_cast<int>(p) + 1));
  }
}

TEST(a_write_is_not_changed_by_the_one_after_it) {
  Rig rig(2);
  rig.update_all();
  rig.gate.shut();
  const std::vector<std::byte> first(kPage * 4, std::byte{1}), second(kPage * 4, std::byte{2});
  {
    const Later later([&] { rig.gate.open(); }, 0);
    rig.pager->write(0, 0, 0, kPage, first.data());
  }
  rig.pager->flush();
  rig.gate.take_events();
  rig.gate.shut();
  rig.pager->write(0, 0, 0, kPage, second.data());
  CHECK(rig.gate.comes('w', 0));
  {
    const Later later([&] { rig.gate.open(); });
    rig.pager->write(0, 0, kPage / 2, kPage / 2, first.data());
  }
  rig.pager->flush();
  const auto written = rig.gate.written();
  CHECK(written.size() == 2 && rig.all(written[0].data(), kPage * 4, 2), "it carried the next one");
  CHECK(rig.all(written[1].data(), kPage * 2, 2) && rig.all(&written[1][kPage * 2], kPage * 2, 1));
}

TEST(in_place_nothing_moves) {
  Rig rig(0);
  rig.pager->prefetch(0);
  const PageView view = rig.pager->acquire(0, nullptr);
  CHECK(rig.is_fresh(view, 0));
  CHECK(view.stream[0] == rig.ram.address(rig.table, rig.table.page(0), 0));
  rig.set(view, 0, 7);
  for (std::int64_t p = 1; p < 4; ++p) rig.pager->acquire(p, nullptr);
  for (std::int64_t p = 0; p < 4; ++p) rig.pager->release(p, nullptr, p == 0);
  rig.pager->flush();
  CHECK(rig.table.page(0).touched && !rig.table.page(1).touched);
  CHECK(rig.reads(0, 7));
  rig.writes(5, 8);
  CHECK(rig.reads(5, 8) && rig.store_has(5, 8));
  rig.table.forget(0);
  CHECK(rig.is_fresh(rig.pager->acquire(0, nullptr), 0), "old bytes of a forgotten page");
  rig.pager->release(0, nullptr, false);
  const PagerCounters counters = rig.pager->take_counters();
  CHECK(counters.bytes_in == 0 && counters.bytes_out == 0 && counters.wait_ms == 0 &&
        counters.transfer_ms == 0 && rig.pager->resident_bytes() == 0);
}

TEST(forgotten_pages_are_fresh_again) {
  for (const int slots : {1, 7}) {
    Rig rig(slots);
    rig.update_all();
    for (std::int64_t p = 0; p < 4; ++p) rig.table.forget(p);
    rig.gate.take_events();
    rig.pager->prefetch(0);
    for (std::int64_t p = 0; p < 4; ++p) {
      CHECK(rig.is_fresh(rig.pager->acquire(p, nullptr), p));
      rig.pager->release(p, nullptr, p % 2 == 0);
    }
    CHECK(rig.gate.total('r') == 0);
  }
}

TEST(counters_count) {
  Rig rig(2);
  rig.update_all();
  rig.pager->prefetch(0);
  for (std::int64_t p = 0; p < 4; ++p) {
    rig.pager->acquire(p, nullptr);
    rig.pager->release(p, nullptr, p < 3);
  }
  rig.pager->flush();
  PagerCounters counters = rig.pager->take_counters();
  CHECK(counters.bytes_in == 4 * rig.record() && counters.bytes_out == 3 * rig.record());
  CHECK(counters.transfer_ms > 0 && counters.wait_ms >= 0);
  counters = rig.pager->take_counters();
  CHECK(counters.bytes_in == 0 && counters.bytes_out == 0 && counters.transfer_ms == 0);
  CHECK(rig.pager->resident_bytes() == 2 * rig.table.max_record_bytes() && rig.pager->slots() == 2);
}

TEST(no_streams_nothing_moves) {
  PageTable table({}, 4096);
  table.add_group(100000);
  table.add_group(50);
  table.add_group(0);
  RamStore ram;
  GateStore gate(ram);
  gate.grow(table);
  gate.shut();
  HostMover mover(gate, table, 1, 4096, 1, 1);
  for (const int slots : {0, 1}) {
    Pager pager(table, gate, slots > 0 ? &mover : nullptr, slots);
    for (int g = 0; g < 3; ++g) {
      pager.prefetch(g);
      for (std::int64_t p = table.first_page(g); p < table.end_page(g); ++p) {
        CHECK(pager.acquire(p, nullptr).stream[0] == nullptr);
        CHECK_THROWS(Order, "acquired already", pager.acquire(p, nullptr));
        pager.release(p, nullptr, true);
      }
    }
    pager.flush();
    const PagerCounters counters = pager.take_counters();
    CHECK(counters.bytes_in == 0 && counters.bytes_out == 0 && pager.resident_bytes() == 0);
  }
  CHECK(gate.take_events().empty());
}

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
