// SPDX-License-Identifier: Apache-2.0
// The host's mover, wait by wait: each test shuts the store's gate, issues copies, and looks which
// of them arrive there. Then its failures, its threads, its clock, and its end.
#include "mover_rig.h"

using namespace hift;
using namespace hift_test;

TEST(bytes_go_in_and_out) {
  Rig rig(3);
  for (int s = 0; s < 3; ++s) {
    CHECK(reinterpret_cast<std::uintptr_t>(rig.mover->slot_address(s)) % 4096 == 0);
    rig.fetch(s, s);
  }
  for (int s = 0; s < 3; ++s) {
    rig.mover->await(s, nullptr);
    CHECK(rig.slot_has(s, s));
    rig.put(s, 10 + s);
    rig.write_back(s, s);
  }
  rig.mover->drain();
  for (int s = 0; s < 3; ++s) CHECK(rig.store_has(s, 10 + s));
  CHECK(rig.store_has(3, 3));
}

TEST(a_slot_s_next_page_waits_for_the_last_to_go_out) {
  Rig rig(2);
  rig.put(0, 50);
  rig.gate.shut();
  rig.write_back(0, 0);
  rig.fetch(1, 0);
  CHECK(rig.gate.comes('w', 0));
  CHECK(rig.gate.stays_away('r', 1), "the slot is overwritten while it is read");
  rig.gate.open();
  rig.mover->await(0, nullptr);
  CHECK(rig.store_has(0, 50) && rig.slot_has(0, 1));
}

TEST(a_slot_s_write_back_waits_for_its_fetch) {
  Rig rig(1);
  rig.gate.shut();
  rig.fetch(2, 0);
  rig.write_back(3, 0);
  CHECK(rig.gate.comes('r', 2));
  CHECK(rig.gate.stays_away('w', 3));
  rig.gate.open();
  rig.mover->drain();
  CHECK(rig.store_has(3, 2));
}

TEST(a_fetch_waits_for_the_page_s_write_back_from_another_slot) {
  Rig rig(2);
  rig.put(0, 60);
  rig.gate.shut();
  rig.write_back(4, 0);
  rig.fetch(4, 1);
  CHECK(rig.gate.comes('w', 4));
  CHECK(rig.gate.stays_away('r', 4), "old bytes are read");
  rig.gate.open();
  rig.mover->await(1, nullptr);
  CHECK(rig.slot_has(1, 60));
}

TEST(a_write_back_waits_for_the_page_s_fetch_into_another_slot) {
  Rig rig(2);
  rig.put(1, 61);
  rig.gate.shut();
  rig.fetch(4, 0);
  rig.write_back(4, 1);
  CHECK(rig.gate.comes('r', 4));
  CHECK(rig.gate.stays_away('w', 4));
  rig.gate.open();
  rig.mover->drain();
  CHECK(rig.slot_has(0, 4) && rig.store_has(4, 61));
}

TEST(write_backs_of_a_page_keep_their_order) {
  Rig rig(3);
  for (int s = 0; s < 3; ++s) rig.put(s, 70 + s);
  rig.gate.shut();
  for (int s = 0; s < 3; ++s) rig.write_back(1, s);
  CHECK(rig.gate.comes('w', 1));
  sleep_ms(20);
  CHECK(rig.gate.total('w') == 1);
  rig.gate.open();
  rig.mover->drain();
  CHECK(rig.store_has(1, 72));
}

TEST(different_slots_overlap) {
  Rig rig(4, 2, 2);
  rig.gate.shut();
  rig.fetch(0, 0);
  rig.fetch(1, 1);
  rig.write_back(2, 2);
  rig.write_back(3, 3);
  CHECK(rig.gate.comes('r', 0) && rig.gate.comes('r', 1));
  CHECK(rig.gate.comes('w', 2) && rig.gate.comes('w', 3));
}

TEST(the_oldest_fetch_goes_first) {
  Rig rig(5, 1, 1);
  rig.gate.shut();
  for (int s = 0; s < 5; ++s) rig.fetch(s, s);
  rig.gate.open();
  rig.mover->drain();
  std::int64_t next = 0;
  for (const auto& [what, page] : rig.gate.take_events()) {
    if (what == 'r') CHECK(page == next++);
  }
}

TEST(await_waits_for_a_fetch) {
  Rig rig(1);
  rig.gate.shut();
  rig.fetch(5, 0);
  double waited;
  {
    const Later later([&] { rig.gate.open(); });
    waited = rig.mover->await(0, nullptr);
    CHECK(rig.slot_has(0, 5));
  }
  CHECK(waited > 20 && waited < 5000, waited, " ms");
  CHECK(rig.mover->await(0, nullptr) == 0);
}

TEST(await_waits_for_a_write_back) {
  Rig rig(1);
  rig.put(0, 80);
  rig.gate.shut();
  rig.write_back(5, 0);
  {
    const Later later([&] { rig.gate.open(); });
    rig.mover->await(0, nullptr);
    rig.put(0, 81);  // the next update
  }
  rig.mover->drain();
  CHECK(rig.store_has(5, 80), "the write-back saw the next update");
}

TEST(await_does_not_wait_for_other_slots) {
  Rig rig(2);
  rig.gate.shut();
  rig.fetch(0, 0);
  CHECK(rig.gate.comes('r', 0));
  CHECK(rig.mover->await(1, nullptr) == 0);
}

TEST(drain_waits_for_all) {
  Rig rig(2);
  rig.put(0, 90);
  rig.gate.shut();
  rig.write_back(0, 0);
  rig.fetch(1, 1);
  rig.fetch(2, 0);
  {
    const Later later([&] { rig.gate.open(); });
    rig.mover->drain();
  }
  CHECK(rig.store_has(0, 90) && rig.slot_has(1, 1) && rig.slot_has(0, 2));
}

TEST(waiting_does_not_spin) {
  Rig rig(1, 4, 4);
  rig.gate.shut();
  rig.fetch(0, 0);
  const double before = cpu_ms();
  {
    const Later later([&] { rig.gate.open(); }, 300);
    rig.mover->await(0, nullptr);
  }
  CHECK(cpu_ms() - before < 150, cpu_ms() - before, " ms of processor time in 300 ms of waiting");
}

TEST(the_end_finishes_write_backs) {
  Rig rig(3, 1, 1);
  for (int s = 0; s < 3; ++s) rig.put(s, 20 + s);
  rig.gate.shut();
  for (int s = 0; s < 3; ++s) rig.write_back(s, s);
  rig.fetch(3, 0);
  rig.fetch(4, 1);
  rig.fetch(4, 2);
  {
    const Later later([&] { rig.gate.open(); });
    rig.mover.reset();
  }
  for (int s = 0; s < 3; ++s) CHECK(rig.store_has(s, 20 + s));
  CHECK(rig.gate.total('r') == 0, "pages nobody wants were fetched");
}

TEST(the_end_finishes_what_cannot_start_yet) {
  Rig rig(1);
  rig.gate.shut();
  rig.fetch(2, 0);
  rig.write_back(3, 0);
  CHECK(rig.gate.comes('r', 2));
  {
    const Later later([&] { rig.gate.open(); });
    rig.mover.reset();
  }
  CHECK(rig.store_has(3, 2));
}

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
