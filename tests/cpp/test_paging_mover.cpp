// SPDX-License-Identifier: Apache-2.0
// The host's mover, wait by wait: each test shuts the store's gate, issues copies, and looks which
// of them arrive there. Then its failures, its threads, its clock, and its end.
#include <dirent.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <set>
#include <string>

#include "check.h"
#include "paging/host_mover.h"
#include "paging_stores.h"

using namespace hift;
using namespace hift_test;
using Failure = std::system_error;

namespace {

constexpr std::int64_t kRecord = 4096;

/// Six one-record pages in memory, page p filled with byte p, behind a gate and faults.
struct Rig {
  explicit Rig(int slots, int readers = 2, int writers = 2)
      : table({{4, 0}}, kRecord), faults(ram), gate(faults) {
    table.add_group(6 * 1024);
    gate.grow(table);
    for (int p = 0; p < 6; ++p) std::memset(stored(p), p, kRecord);
    mover = std::make_unique<HostMover>(gate, table, slots, kRecord, readers, writers);
  }
  ~Rig() {
    gate.open();
    mover.reset();
  }
  const Page& page(std::int64_t p) { return table.page(p); }
  std::byte* stored(std::int64_t p) { return ram.address(table, table.page(p), 0); }
  void fetch(std::int64_t p, int slot) { mover->fetch(page(p), slot); }
  void write_back(std::int64_t p, int slot) { mover->write_back(page(p), slot, nullptr); }
  void put(int slot, int value) { std::memset(mover->slot_address(slot), value, kRecord); }
  bool slot_has(int slot, int value) { return all(mover->slot_address(slot), value); }
  bool store_has(std::int64_t p, int value) { return all(stored(p), value); }
  static bool all(const std::byte* bytes, int value) {
    return std::all_of(bytes, bytes + kRecord, [&](std::byte b) { return b == std::byte(value); });
  }

  PageTable table;
  RamStore ram;
  FaultStore faults;
  GateStore gate;
  std::unique_ptr<HostMover> mover;
};

double cpu_ms() {
  struct rusage usage;
  ::getrusage(RUSAGE_SELF, &usage);
  const auto ms = [](const timeval& t) { return t.tv_sec * 1e3 + t.tv_usec * 1e-3; };
  return ms(usage.ru_utime) + ms(usage.ru_stime);
}

}  // namespace

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

TEST(a_failed_write_back_poisons_its_slot_only) {
  Rig rig(3);
  rig.put(0, 33);
  rig.faults.fail_write(1, ENOSPC, true);
  rig.gate.shut();
  rig.write_back(1, 0);
  rig.fetch(2, 0);
  rig.fetch(1, 1);
  rig.fetch(3, 2);
  CHECK(rig.gate.comes('w', 1));
  rig.gate.open();
  CHECK_THROWS(Failure, "cannot write page 1", rig.mover->await(0, nullptr));
  CHECK_THROWS(Failure, "cannot write page 1", rig.mover->await(0, nullptr));
  CHECK_THROWS(Failure, "cannot write page 1", rig.mover->wait(0));
  CHECK_THROWS(Failure, "cannot write page 1", rig.fetch(4, 0));
  CHECK_THROWS(Failure, "cannot write page 1", rig.write_back(4, 0));
  CHECK_THROWS(Failure, "cannot write page 1", rig.mover->drain());
  CHECK(rig.slot_has(0, 33), "the only good copy is gone");
  CHECK(rig.mover->failed(0) && rig.mover->unsaved(0) == 1);
  CHECK_THROWS(Failure, "cannot write page 1", rig.mover->await(1, nullptr));
  CHECK(rig.mover->failed(1) && rig.mover->unsaved(1) == -1);
  rig.mover->await(2, nullptr);
  CHECK(rig.slot_has(2, 3) && !rig.mover->failed(2) && rig.mover->unsaved(2) == -1);
  CHECK(!rig.gate.seen('r', 2) && !rig.gate.seen('r', 1), "what was dropped ran");
  try {
    rig.mover->drain();
  } catch (const Failure& error) {
    CHECK(error.code().value() == ENOSPC);
  }

  // Still full: a fetch of the page goes on failing, whichever slot is retried.
  rig.mover->retry(1);
  rig.fetch(1, 1);
  CHECK_THROWS(Failure, "cannot write page 1", rig.mover->await(1, nullptr));
  rig.mover->retry(0);
  CHECK_THROWS(Failure, "cannot write page 1", rig.mover->await(0, nullptr));
  CHECK(rig.slot_has(0, 33) && rig.mover->unsaved(0) == 1);

  rig.faults.heal();
  rig.mover->retry(0);
  rig.mover->retry(1);
  rig.mover->retry(2);  // nothing to do
  rig.fetch(1, 1);
  rig.fetch(2, 0);
  rig.mover->drain();
  CHECK(rig.store_has(1, 33) && rig.slot_has(1, 33) && rig.slot_has(0, 2));
}

TEST(a_failed_fetch_is_the_caller_s_to_repeat) {
  Rig rig(2);
  rig.faults.fail_read(1, EIO);
  rig.fetch(3, 0);
  CHECK_THROWS(Failure, "cannot read page 3", rig.mover->await(0, nullptr));
  CHECK_THROWS(Failure, "cannot read page 3", rig.mover->drain());
  CHECK(rig.mover->failed(0) && rig.mover->unsaved(0) == -1);
  rig.mover->retry(0);
  rig.mover->drain();
  CHECK(rig.gate.total('w') == 0, "a retry wrote what was not fetched");
  rig.fetch(3, 0);
  rig.mover->await(0, nullptr);
  CHECK(rig.slot_has(0, 3) && rig.store_has(3, 3));
}

TEST(a_write_back_behind_a_failed_fetch_is_dropped) {
  Rig rig(1);
  rig.faults.fail_read(1, EIO);
  rig.gate.shut();
  rig.fetch(3, 0);
  rig.write_back(3, 0);
  rig.gate.open();
  CHECK_THROWS(Failure, "cannot read page 3", rig.mover->drain());
  CHECK(rig.store_has(3, 3) && rig.gate.total('w') == 0 && rig.mover->unsaved(0) == -1);
}

TEST(the_end_does_not_hang_on_failures) {
  Rig rig(2);
  rig.faults.fail_write(1, EIO, true);
  rig.put(0, 1);
  rig.write_back(0, 0);
  rig.fetch(0, 1);
  rig.mover.reset();
}

TEST(busy_time_is_counted_once) {
  Rig rig(2);
  rig.gate.shut();
  rig.fetch(0, 0);
  rig.fetch(1, 1);
  CHECK(rig.gate.comes('r', 0) && rig.gate.comes('r', 1));
  const auto start = std::chrono::steady_clock::now();
  const auto passed = [&] {
    const auto now = std::chrono::steady_clock::now();
    return std::chrono::duration<double, std::milli>(now - start).count();
  };
  rig.mover->take_busy_ms();
  sleep_ms(60);
  double busy = rig.mover->take_busy_ms();
  CHECK(busy >= 55 && busy <= passed() + 1, busy, " of ", passed(), " ms for two copies at once");
  sleep_ms(30);
  rig.gate.open();
  rig.mover->drain();
  const double ended = passed();
  sleep_ms(50);
  busy += rig.mover->take_busy_ms();
  CHECK(busy <= ended + 1, "idle time is counted: ", busy, " of ", ended, " ms");
  CHECK(rig.mover->take_busy_ms() == 0);
}

TEST(threads_have_names_and_take_no_signal) {
  const Rig rig(1, 2, 3);
  std::multiset<std::string> names;
  bool ready = false;
  // A thread that is just being made blocks everything for a moment.
  for (int attempt = 0; attempt < 1000 && !ready; ++attempt) {
    names.clear();
    ready = true;
    sleep_ms(1);
    DIR* tasks = ::opendir("/proc/self/task");
    while (const dirent* task = ::readdir(tasks)) {
      std::ifstream status(text("/proc/self/task/", task->d_name, "/status"));
      std::string line, name;
      std::uint64_t blocked = 0;
      while (std::getline(status, line)) {
        if (line.rfind("Name:", 0) == 0) name = line.substr(6);
        if (line.rfind("SigBlk:", 0) == 0) blocked = std::stoull(line.substr(8), nullptr, 16);
      }
      if (name.rfind("hift-", 0) != 0) continue;
      names.insert(name);
      for (const int signal : {SIGINT, SIGTERM, SIGUSR1, SIGCHLD, SIGALRM, SIGXFSZ}) {
        CHECK((blocked >> (signal - 1) & 1) == 1, name, " takes signal ", signal);
      }
      ready = ready && (blocked >> (SIGSEGV - 1) & 1) == 0;
    }
    ::closedir(tasks);
    ready = ready && names.size() == 5;
  }
  CHECK(ready, "faults stay reported");
  CHECK(names == std::multiset<std::string>({"hift-read-0", "hift-read-1", "hift-write-0",
                                             "hift-write-1", "hift-write-2"}),
        names.size(), " threads");
  sigset_t now;
  ::pthread_sigmask(SIG_SETMASK, nullptr, &now);
  CHECK(::sigismember(&now, SIGINT) == 0, "the caller's mask is left changed");
}

TEST(a_forked_child_gets_an_error_and_no_hang) {
  Rig rig(2);
  rig.gate.shut();
  rig.fetch(0, 0);
  CHECK(rig.gate.comes('r', 0));
  const pid_t child = ::fork();
  if (child == 0) {
    ::alarm(20);
    hift_test::failures = 0;
    CHECK_THROWS(std::logic_error, "forked child", rig.fetch(1, 1));
    CHECK_THROWS(std::logic_error, "forked child", rig.write_back(1, 1));
    CHECK_THROWS(std::logic_error, "forked child", rig.mover->await(0, nullptr));
    CHECK_THROWS(std::logic_error, "forked child", rig.mover->wait(0));
    CHECK_THROWS(std::logic_error, "forked child", rig.mover->drain());
    CHECK_THROWS(std::logic_error, "forked child", rig.mover->retry(0));
    CHECK_THROWS(std::logic_error, "forked child", rig.mover->failed(0));
    CHECK_THROWS(std::logic_error, "forked child", rig.mover->slot_address(0));
    CHECK_THROWS(std::logic_error, "forked child", rig.mover->take_busy_ms());
    rig.mover.reset();
    ::_exit(hift_test::failures == 0 ? 0 : 1);
  }
  int status = 0;
  ::waitpid(child, &status, 0);
  CHECK(WIFEXITED(status) && WEXITSTATUS(status) == 0, "child ended with ", status);
  rig.gate.open();
  rig.mover->await(0, nullptr);
  CHECK(rig.slot_has(0, 0), "the parent goes on");
}

TEST(mover_arguments) {
  Rig rig(2);
  using Bad = std::invalid_argument;
  CHECK_THROWS(Bad, "slot 2", rig.fetch(0, 2));
  CHECK_THROWS(Bad, "slot -1", rig.mover->await(-1, nullptr));
  CHECK_THROWS(Bad, "slot 2", rig.mover->slot_address(2));
  CHECK_THROWS(Bad, "slot", HostMover(rig.gate, rig.table, 0, kRecord, 1, 1));
  CHECK_THROWS(Bad, "size", HostMover(rig.gate, rig.table, 1, 0, 1, 1));
  CHECK_THROWS(Bad, "readers", HostMover(rig.gate, rig.table, 1, kRecord, 0, 1));
  CHECK_THROWS(Bad, "writers", HostMover(rig.gate, rig.table, 1, kRecord, 1, 0));
  PageTable large({{4, 0}}, 3 * kRecord);
  large.add_group(3 * 1024);
  CHECK_THROWS(Bad, "12288", rig.mover->fetch(large.page(0), 0));
  CHECK(HostMover(rig.gate, rig.table, 1, 5, 1, 1).slot_bytes() == 4096);
}

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
