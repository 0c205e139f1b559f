// SPDX-License-Identifier: Apache-2.0
// The pager's other calls: orders and ranges that are refused, reads and writes of elements
// wherever their pages are, flush, pages in place, counters.
#include "pager_rig.h"

using namespace hift;
using namespace hift_test;
using Order = std::logic_error;
using Bad = std::invalid_argument;

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
