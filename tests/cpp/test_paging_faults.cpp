// SPDX-License-Identifier: Apache-2.0
// Reads and writes that fail: the error comes out of the next call, no page is lost or wrong
// meanwhile, and once the cause is cured everything gets home.
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <filesystem>
#include <memory>
#include <vector>

#include "check.h"
#include "paging/file_store.h"
#include "paging/host_mover.h"
#include "paging/pager.h"
#include "paging_stores.h"

using namespace hift;
using namespace hift_test;
using Failure = std::system_error;

namespace {

constexpr std::int64_t kPage = 1024;

/// Six one-stream pages in two groups; page p holds p + 1 everywhere, on the store.
struct Rig {
  Rig(Store& inner, int slots) : table({{4, 0}}, 4 * kPage), faults(inner), gate(faults) {
    table.add_group(3 * kPage);
    table.add_group(3 * kPage);
    gate.grow(table);
    mover = std::make_unique<HostMover>(gate, table, slots, table.max_record_bytes(), 2, 2);
    pager = std::make_unique<Pager>(table, gate, mover.get(), slots);
    for (std::int64_t p = 0; p < 6; ++p) update(p, static_cast<int>(p) + 1);
    pager->flush();
  }
  ~Rig() {
    gate.open();
    pager.reset();
    mover.reset();
  }
  void update(std::int64_t p, int value) {
    const PageView view = pager->acquire(p, nullptr);
    std::memset(view.stream[0], value, 4 * kPage);
    pager->release(p, nullptr, true);
  }
  bool has(const std::byte* bytes, int value) {
    return std::all_of(bytes, bytes + 4 * kPage,
                       [&](std::byte b) { return b == std::byte(value); });
  }
  bool reads(std::int64_t p, int value) {
    std::vector<std::byte> got(4 * kPage);
    pager->read(p < 3 ? 0 : 1, 0, p % 3 * kPage, kPage, got.data());
    return has(got.data(), value);
  }
  bool store_has(std::int64_t p, int value) {
    Slab record(table.max_record_bytes());
    gate.read(table, table.page(p), record.data());
    return has(record.data(), value);
  }
  void write(std::int64_t p, int value) {
    const std::vector<std::byte> from(4 * kPage, std::byte(value));
    pager->write(p < 3 ? 0 : 1, 0, p % 3 * kPage, kPage, from.data());
  }

  PageTable table;
  FaultStore faults;
  GateStore gate;
  std::unique_ptr<HostMover> mover;
  std::unique_ptr<Pager> pager;
};

}  // namespace

TEST(a_failed_write_back_comes_out_of_flush) {
  for (const int slots : {1, 2, 3, 6}) {
    RamStore ram;
    Rig rig(ram, slots);
    rig.pager->acquire(1, nullptr);
    rig.pager->release(1, nullptr, false);
    rig.faults.fail_write(1, ENOSPC, true);
    rig.update(1, 50);
    CHECK_THROWS(Failure, "cannot write page 1", rig.pager->flush());
    CHECK_THROWS(Failure, "cannot write page 1", rig.pager->flush());
    for (std::int64_t p = 0; p < 6; ++p) {
      CHECK(rig.reads(p, p == 1 ? 50 : static_cast<int>(p) + 1), "slots ", slots, " page ", p);
    }
    CHECK_THROWS(Failure, "cannot write page 1", rig.pager->flush());
    rig.faults.heal();
    rig.pager->flush();
    for (std::int64_t p = 0; p < 6; ++p) {
      CHECK(rig.store_has(p, p == 1 ? 50 : static_cast<int>(p) + 1), "slots ", slots, " page ", p);
    }
  }
}

TEST(a_failed_write_back_comes_out_of_the_next_acquire_of_its_slot) {
  RamStore ram;
  Rig rig(ram, 1);
  rig.pager->prefetch(0);
  rig.faults.fail_write(1, ENOSPC, true);
  rig.update(0, 50);  // page 1 is asked for behind it
  CHECK_THROWS(Failure, "cannot write page 0", rig.pager->acquire(1, nullptr));
  CHECK_THROWS(Failure, "cannot write page 0", rig.pager->acquire(1, nullptr));
  CHECK(rig.reads(0, 50) && rig.reads(1, 2));
  rig.faults.heal();
  CHECK(rig.has(rig.pager->acquire(1, nullptr).stream[0], 2));
  rig.pager->release(1, nullptr, false);
  rig.pager->flush();
  CHECK(rig.store_has(0, 50));
}

TEST(a_failed_write_back_is_found_by_the_prefetch_that_needs_its_slot) {
  RamStore ram;
  Rig rig(ram, 3);
  rig.pager->prefetch(0);
  rig.pager->flush();
  rig.faults.fail_write(1, EIO, true);
  rig.update(0, 50);
  rig.update(1, 51);
  while (rig.faults.failed() < 2) sleep_ms(1);
  sleep_ms(5);
  CHECK_THROWS(Failure, "cannot write page 0", rig.pager->prefetch(1));
  CHECK(rig.reads(0, 50) && rig.reads(1, 51) && rig.reads(3, 4));
  rig.faults.heal();
  rig.pager->prefetch(1);
  for (std::int64_t p = 3; p < 6; ++p) rig.update(p, static_cast<int>(p) + 60);
  rig.pager->flush();
  CHECK(rig.store_has(0, 50) && rig.store_has(1, 51) && rig.store_has(5, 65));
}

TEST(release_throws_nothing_and_the_next_call_does) {
  /// Gives a copy the time to fail before the call that issued it returns.
  class Patient final : public Mover {
   public:
    explicit Patient(Mover& inner) : inner_(inner) {}
    std::byte* slot_address(int slot) override { return inner_.slot_address(slot); }
    std::int64_t slot_bytes() const override { return inner_.slot_bytes(); }
    void fetch(const Page& page, int slot) override { inner_.fetch(page, slot); }
    double await(int slot, void* stream) override { return inner_.await(slot, stream); }
    void wait(int slot) override { inner_.wait(slot); }
    void write_back(const Page& page, int slot, void* stream) override {
      inner_.write_back(page, slot, stream);
      sleep_ms(20);
    }
    void retry(int slot) override { inner_.retry(slot); }
    bool failed(int slot) const override { return inner_.failed(slot); }
    std::int64_t unsaved(int slot) const override { return inner_.unsaved(slot); }
    void drain() override { inner_.drain(); }
    double take_busy_ms() override { return inner_.take_busy_ms(); }

   private:
    Mover& inner_;
  };
  for (const char* next : {"acquire", "prefetch", "flush"}) {
    RamStore ram;
    Rig rig(ram, 1);
    Patient patient(*rig.mover);
    rig.pager = std::make_unique<Pager>(rig.table, rig.gate, &patient, 1);
    rig.pager->prefetch(0);
    rig.faults.fail_write(1, EIO);
    rig.update(0, 50);
    const auto call = [&] {
      if (*next == 'a') rig.pager->acquire(1, nullptr);
      if (*next == 'p') rig.pager->prefetch(1);
      if (*next == 'f') rig.pager->flush();
    };
    CHECK_THROWS(Failure, "cannot write page 0", call());
    CHECK(rig.reads(0, 50) && rig.reads(1, 2));
    CHECK(rig.has(rig.pager->acquire(1, nullptr).stream[0], 2));
    rig.pager->release(1, nullptr, false);
    rig.pager->flush();
    CHECK(rig.store_has(0, 50));
    rig.pager.reset();
  }
}

TEST(a_failed_read_comes_out_of_acquire_and_is_repeated) {
  for (const int slots : {1, 2, 3}) {
    RamStore ram;
    Rig rig(ram, slots);
    rig.pager->prefetch(1);
    rig.pager->flush();
    rig.faults.fail_read(1, EIO, true);
    rig.pager->prefetch(0);
    CHECK_THROWS(Failure, "cannot read page 0", rig.pager->acquire(0, nullptr));
    CHECK_THROWS(Failure, "cannot read page 0", rig.pager->acquire(0, nullptr));
    CHECK_THROWS(Failure, "cannot read page 0", rig.reads(0, 1));
    rig.faults.heal();
    CHECK(rig.reads(0, 1));
    for (std::int64_t p = 0; p < 3; ++p) {
      try {
        CHECK(rig.has(rig.pager->acquire(p, nullptr).stream[0], static_cast<int>(p) + 1));
      } catch (const Failure&) {  // it failed before the cure: this is its turn to say so
        CHECK(rig.has(rig.pager->acquire(p, nullptr).stream[0], static_cast<int>(p) + 1));
      }
      rig.pager->release(p, nullptr, false);
    }
  }
}

TEST(a_page_that_was_lost_is_not_read_from_the_store) {
  // Its slot has been promised to another page, its bytes on the store are torn, and it is asked
  // for in a second slot: the good ones are in the first.
  RamStore ram;
  Rig rig(ram, 2);
  rig.pager->prefetch(0);
  rig.gate.shut();
  rig.faults.fail_write(1, ENOSPC, true);
  PageView view;
  {
    const Later later([&] { rig.gate.open(); }, 5);
    view = rig.pager->acquire(0, nullptr);
  }
  rig.gate.shut();
  std::memset(view.stream[0], 77, 4 * kPage);
  rig.pager->release(0, nullptr, true);  // page 2 is asked for in its slot
  rig.gate.comes('w', 0);
  {
    const Later later([&] { rig.gate.open(); });
    CHECK(rig.reads(0, 77));
  }
  CHECK_THROWS(Failure, "cannot write page 0", rig.pager->prefetch(0));
  rig.faults.heal();
  CHECK(rig.has(rig.pager->acquire(0, nullptr).stream[0], 77));
  rig.pager->release(0, nullptr, false);
  rig.pager->flush();
  CHECK(rig.store_has(0, 77) && rig.store_has(2, 3));
}

TEST(a_retried_page_on_its_way_out_is_waited_for) {
  RamStore ram;
  Rig rig(ram, 1);
  rig.faults.fail_write(1, EIO);
  rig.update(0, 50);
  CHECK_THROWS(Failure, "cannot write page 0", rig.pager->flush());
  rig.gate.shut("w");
  rig.pager->prefetch(1);  // page 0 goes out again, page 3 comes in behind it
  {
    const Later later([&] { rig.gate.open(); });
    CHECK(rig.reads(0, 50), "the torn bytes of the failed write");
  }
}

TEST(a_lost_page_has_one_slot) {
  RamStore ram;
  Rig rig(ram, 2);
  rig.pager->prefetch(0);
  rig.gate.shut("w");
  rig.faults.fail_write(1, EIO);
  rig.update(0, 50);
  rig.pager->prefetch(1);
  rig.pager->prefetch(0);  // page 0 is asked for in another slot than it is leaving
  rig.gate.open();
  CHECK_THROWS(Failure, "cannot write page 0", rig.pager->acquire(0, nullptr));
  CHECK(rig.has(rig.pager->acquire(0, nullptr).stream[0], 50));
  CHECK(rig.has(rig.pager->acquire(1, nullptr).stream[0], 2));
  rig.pager->release(0, nullptr, false);
  rig.pager->release(1, nullptr, false);
  rig.pager->flush();
  CHECK(rig.store_has(0, 50));
}

TEST(a_page_whose_slot_a_lost_one_took_back_is_asked_for_again) {
  RamStore ram;
  Rig rig(ram, 2);
  rig.pager->prefetch(0);
  rig.faults.fail_write(1, EIO);
  rig.update(0, 50);  // page 2 is asked for behind it
  CHECK_THROWS(Failure, "cannot write page 0", rig.pager->flush());
  rig.pager->flush();
  rig.gate.take_events();
  rig.pager->acquire(1, nullptr);
  rig.pager->release(1, nullptr, false);
  CHECK(rig.gate.comes('R', 2));
}

TEST(a_write_that_fails_leaves_the_page_whole) {
  for (const int slots : {1, 2, 6}) {
    RamStore ram;
    Rig rig(ram, slots);
    rig.faults.fail_write(1, ENOSPC, true);
    rig.write(4, 88);
    CHECK(rig.reads(4, 88), "the good bytes are in the slot");
    CHECK_THROWS(Failure, "cannot write page 4", rig.pager->flush());
    CHECK(rig.reads(4, 88));
    CHECK_THROWS(Failure, "cannot write page 4", rig.write(4, 89));
    CHECK(rig.reads(4, 88), "a refused write changed something");
    if (slots == 1) CHECK_THROWS(Failure, "cannot write page 4", rig.write(3, 90));
    rig.faults.heal();
    rig.write(4, 91);
    rig.write(3, 92);
    rig.pager->flush();
    CHECK(rig.store_has(4, 91) && rig.store_has(3, 92) && rig.store_has(5, 6));
  }
}

TEST(an_error_found_by_read_is_not_forgotten) {
  RamStore ram;
  Rig rig(ram, 2);
  rig.pager->prefetch(0);
  rig.faults.fail_write(1, EIO);
  rig.update(0, 50);
  CHECK(rig.reads(0, 50));
  CHECK(rig.reads(0, 50));
  CHECK_THROWS(Failure, "cannot write page 0", rig.pager->flush());
  rig.pager->flush();
  CHECK(rig.store_has(0, 50));
}

TEST(an_error_is_thrown_once_if_its_cause_is_gone) {
  RamStore ram;
  Rig rig(ram, 3);
  rig.pager->prefetch(0);
  rig.faults.fail_write(1, EIO);
  rig.update(0, 50);
  CHECK_THROWS(Failure, "cannot write page 0", rig.pager->flush());
  rig.pager->flush();
  rig.pager->prefetch(1);
  rig.update(3, 51);
  rig.pager->flush();
  CHECK(rig.store_has(0, 50) && rig.store_has(3, 51));
}

TEST(a_file_truncated_under_the_pager) {
  const std::string path = text("/var/tmp/hift-test-faults-", ::getpid());
  {
    FileStore file(path);
    Rig rig(file, 2);
    rig.pager->prefetch(0);
    rig.update(0, 50);
    rig.pager->flush();
    CHECK(::truncate(path.c_str(), kFileHeaderBytes + rig.table.page(3).offset) == 0);
    CHECK(rig.reads(0, 50) && rig.reads(2, 3), "what is left of the file");
    CHECK_THROWS(Failure, "truncated under us", rig.reads(5, 6));
    CHECK_THROWS(Failure, path, rig.pager->acquire(4, nullptr));
    try {
      rig.pager->flush();
    } catch (const Failure&) {  // page 3, if its prefetch had not failed by then
    }
    // A page whose place is gone lives in its slot.
    rig.table.forget(5);
    rig.write(5, 60);
    CHECK_THROWS(Failure, "truncated under us", rig.pager->flush());
    CHECK(rig.reads(5, 60) && rig.reads(1, 2));
    // Made long again by whoever truncated it: it gets home.
    CHECK(::truncate(path.c_str(), file.bytes()) == 0);
    rig.pager->flush();
    CHECK(rig.store_has(5, 60) && rig.reads(0, 50));
  }
  std::filesystem::remove(path);
}

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
