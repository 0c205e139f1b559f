// SPDX-License-Identifier: Apache-2.0
// The host's mover in trouble: failed copies, the end with work left, signals, forks; and its
// clock. A page's last good bytes are never lost.
#include "mover_rig.h"

using namespace hift;
using namespace hift_test;

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
