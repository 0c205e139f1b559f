// SPDX-License-Identifier: Apache-2.0
// The pager, call by call: what moves when, what waits for what, which orders are refused. Copies
// stop at a gate, so that each wait that is missing shows as wrong bytes.
#include "pager_rig.h"

using namespace hift;
using namespace hift_test;
using Order = std::logic_error;
using Bad = std::invalid_argument;

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

TEST(a_record_is_read_once_for_all_its_streams) {
  Rig rig(2);
  rig.update_all();
  CHECK(rig.reads(0, 1));
  CHECK(rig.gate.seen('r', 0) && rig.gate.total('r') == 1);
  // What was kept of it is not given out once the page has changed and left its slot.
  for (const int p : {0, 2, 3}) rig.update(p, 42 + p);
  rig.pager->flush();
  CHECK(rig.reads(0, 42));
  rig.writes(0, 50);
  for (const int p : {2, 3}) rig.update(p, 42 + p);
  rig.pager->flush();
  CHECK(rig.reads(0, 50));
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

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
