// SPDX-License-Identifier: Apache-2.0
// The mover's promises one by one, without an engine that happens to keep its own order. The work
// that uses a slot is queued by the test; every case runs under many schedules.
#include <chrono>
#include <cmath>
#include <cstring>
#include <thread>
#include <vector>

#include "mover_rig.h"

namespace {

using namespace hift_test;

TEST(work_finds_the_page_in_the_slot) {
  under_schedules([](Rig& rig) {
    rig.mover->fetch(rig.table.page(1), 0);
    rig.mover->await(0, rig.streams[0]);
    rig.keep(0);
    return rig.kept(2);
  });
}

TEST(a_write_back_takes_what_the_work_before_it_left) {
  under_schedules([](Rig& rig) {
    rig.mover->await(0, rig.streams[0]);
    rig.write(0, 9);
    rig.mover->write_back(rig.table.page(0), 0, rig.streams[0]);
    rig.mover->wait(0);
    return Rig::all(rig.host(0), 9);
  });
}

TEST(a_slot_is_not_refilled_before_its_page_has_left) {
  under_schedules([](Rig& rig) {
    rig.mover->await(0, rig.streams[0]);
    rig.write(0, 9);
    rig.mover->write_back(rig.table.page(0), 0, rig.streams[0]);
    rig.mover->fetch(rig.table.page(1), 0);
    rig.mover->wait(0);
    return Rig::all(rig.host(0), 9);
  });
}

TEST(a_slot_released_unchanged_is_not_refilled_under_its_readers) {
  under_schedules([](Rig& rig) {
    rig.mover->fetch(rig.table.page(0), 0);
    rig.mover->await(0, rig.streams[0]);
    rig.keep(0);
    rig.mover->fetch(rig.table.page(1), 0);
    return rig.kept(1);
  });
}

TEST(a_page_comes_in_with_the_bytes_that_left_another_slot) {
  under_schedules([](Rig& rig) {
    rig.mover->await(0, rig.streams[0]);
    rig.write(0, 9);
    rig.mover->write_back(rig.table.page(2), 0, rig.streams[0]);
    rig.mover->fetch(rig.table.page(2), 1);
    rig.mover->await(1, rig.streams[1]);
    rig.keep(1, 1);
    return rig.kept(9, 1);
  });
}

TEST(work_does_not_change_bytes_that_are_leaving) {
  under_schedules([](Rig& rig) {
    rig.mover->await(0, rig.streams[0]);
    rig.write(0, 9);
    rig.mover->write_back(rig.table.page(0), 0, rig.streams[0]);
    rig.mover->await(0, rig.streams[1]);
    rig.write(0, 10, 1);
    rig.mover->drain();
    return Rig::all(rig.host(0), 9);
  });
}

TEST(a_page_that_nobody_awaited_leaves_as_it_came) {
  under_schedules([](Rig& rig) {
    rig.mover->fetch(rig.table.page(1), 0);
    rig.mover->write_back(rig.table.page(2), 0, rig.streams[0]);
    rig.mover->drain();
    return Rig::all(rig.host(2), 2);
  });
}

TEST(work_on_another_stream_comes_after_the_first) {
  under_schedules([](Rig& rig) {
    rig.mover->await(0, rig.streams[0]);
    rig.write(0, 9);
    rig.mover->await(0, rig.streams[1]);
    rig.keep(0, 1);
    return rig.kept(9, 1);
  });
}

TEST(the_host_waits_for_everything_on_a_slot) {
  under_schedules([](Rig& rig) {
    bool done = false;
    rig.mover->fetch(rig.table.page(1), 0);
    rig.mover->await(0, rig.streams[0]);
    rig.launch(0, [&] { done = true; });
    rig.mover->wait(0);
    const bool waited = done;
    std::vector<std::byte> bytes(kElements * 4);
    rig.mover->peek(0, 0, kElements * 4, bytes.data());
    return waited && Rig::all(bytes.data(), 2);
  });
}

TEST(the_host_waits_for_a_copy_alone) {
  under_schedules([](Rig& rig) {
    rig.mover->fetch(rig.table.page(1), 0);
    rig.mover->wait(0);
    std::vector<std::byte> bytes(kElements * 4);
    rig.mover->peek(0, 0, kElements * 4, bytes.data());
    return Rig::all(bytes.data(), 2);
  });
}

TEST(a_fill_is_there_for_who_looks) {
  const hift::Stream pattern{4, 0x3f800000u};  // 1.0f
  under_schedules([&](Rig& rig) {
    rig.mover->await(0, rig.streams[0]);
    rig.mover->fill(0, 0, kElements, pattern, rig.streams[0]);
    std::vector<std::byte> bytes(kElements * 4);
    rig.mover->peek(0, 0, kElements * 4, bytes.data());
    return Rig::all(bytes.data(), 1);
  });
}

TEST(a_poke_comes_after_a_fill_and_leaves_with_the_page) {
  const hift::Stream pattern{4, 0x3f800000u};
  under_schedules([&](Rig& rig) {
    rig.mover->fill(0, 0, kElements, pattern, rig.streams[0]);
    std::vector<std::byte> bytes(kElements * 4);
    Rig::fill(bytes.data(), 7);
    rig.mover->poke(0, 0, kElements * 4, bytes.data());
    rig.mover->write_back(rig.table.page(3), 0, rig.streams[0]);
    rig.mover->wait(0);
    return Rig::all(rig.host(3), 7);
  });
}

TEST(bytes_of_any_length_pass_the_bounce_buffer) {
  under_schedules([](Rig& rig) {
    rig.mover->fetch(rig.table.page(0), 1);
    rig.mover->wait(1);
    const float value = 5;
    rig.mover->poke(1, 4 * 17, 4, reinterpret_cast<const std::byte*>(&value));
    float found[3];
    rig.mover->peek(1, 4 * 16, sizeof found, reinterpret_cast<std::byte*>(found));
    return found[0] == 1 && found[1] == 5 && found[2] == 1;
  });
}

TEST(a_fetch_that_fails_midway_has_nothing_under_way) {
  const hift::Stream pattern{4, 0x3f800000u};
  for (std::int64_t call = 0; call < 25; ++call) {
    under_schedules([&](Rig& rig) {
      rig.mover->fetch(rig.table.page(2), 1);  // the group is registered
      fail_call(call);
      try {
        rig.mover->fetch(rig.table.page(1), 0);
      } catch (const std::runtime_error&) {
      }
      fail_call(-1);
      // The slot is given to a page that nothing has touched.
      rig.mover->await(0, rig.streams[0]);
      rig.mover->fill(0, 0, kElements, pattern, rig.streams[0]);
      rig.keep(0);
      rig.mover->drain();
      return rig.kept(1);
    });
  }
}

TEST(a_drained_mover_has_nothing_under_way) {
  under_schedules([](Rig& rig) {
    rig.mover->await(0, rig.streams[0]);
    rig.write(0, 9);
    rig.mover->write_back(rig.table.page(0), 0, rig.streams[0]);
    rig.mover->drain();
    return Rig::all(rig.host(0), 9);
  });
}

/// A file that takes its time.
class SlowStore final : public hift::Store {
 public:
  explicit SlowStore(RamStore& store) : store_(store) {}
  void grow(const PageTable&) override {}
  std::byte* address(const PageTable&, const Page&, int) override { return nullptr; }
  void read(const PageTable& table, const Page& page, std::byte* record) override {
    std::this_thread::sleep_for(std::chrono::milliseconds(1));
    store_.read(table, page, record);
  }
  void write(const PageTable& table, const Page& page, const std::byte* record) override {
    std::this_thread::sleep_for(std::chrono::milliseconds(3));
    store_.write(table, page, record);
  }
  std::int64_t bytes() const override { return 0; }
  std::string description() const override { return "slow"; }

 private:
  RamStore& store_;
};

/// A mover between such a file and the rig's ring.
struct SlowMover {
  explicit SlowMover(Rig& rig)
      : slow(rig.store),
        mover(slow, rig.table, {static_cast<std::byte*>(rig.ring), kSlots, kElements * 4, kDevice},
              1, 1) {}
  SlowStore slow;
  hift::cuda::FileMover mover;
};

TEST(a_drained_mover_has_written_its_file) {
  under_schedules([](Rig& rig) {
    SlowMover file(rig);
    file.mover.await(0, rig.streams[0]);
    rig.write(0, 9);
    file.mover.write_back(rig.table.page(0), 0, rig.streams[0]);
    file.mover.drain();
    return Rig::all(rig.host(0), 9);
  });
}

TEST(a_drained_mover_has_brought_in_what_it_read) {
  under_schedules([](Rig& rig) {
    SlowMover file(rig);
    file.mover.fetch(rig.table.page(1), 0);
    file.mover.drain();
    std::vector<std::byte> bytes(kElements * 4);
    file.mover.peek(0, 0, kElements * 4, bytes.data());
    return Rig::all(bytes.data(), 2);
  });
}

TEST(a_page_of_a_file_that_nobody_awaited_leaves_as_it_came) {
  under_schedules([](Rig& rig) {
    SlowMover file(rig);
    file.mover.fetch(rig.table.page(1), 0);
    file.mover.write_back(rig.table.page(2), 0, rig.streams[0]);
    file.mover.drain();
    return Rig::all(rig.host(2), 2);
  });
}

TEST(times_are_told_once_and_never_more_than_passed) {
  under_schedules([](Rig& rig) {
    for (int turn = 0; turn < 5; ++turn) {
      for (int slot = 0; slot < kSlots; ++slot) {
        rig.mover->fetch(rig.table.page(slot), slot);
        rig.mover->await(slot, rig.streams[0]);
        rig.mover->write_back(rig.table.page(slot), slot, rig.streams[0]);
      }
    }
    rig.mover->drain();
    cudaStreamSynchronize(rig.streams[0]);
    const double passed = 0.01 * static_cast<double>(stats().operations);
    const double busy = rig.mover->take_busy_ms(), waited = rig.mover->take_wait_ms();
    return busy > 0 && busy <= passed && waited > 0 && waited <= passed &&
           rig.mover->take_busy_ms() == 0 && rig.mover->take_wait_ms() == 0;
  });
}

TEST(each_copy_and_wait_is_told_where_it_is_wanted) {
  under_schedules([](Rig& rig) {
    using Kind = hift::Interval::Kind;
    hift::IntervalLog log;
    rig.mover->log_to(log);
    const auto visit = [&](int page) {
      rig.mover->fetch(rig.table.page(page), 0);
      rig.mover->await(0, rig.streams[0]);
      rig.mover->write_back(rig.table.page(page), 0, rig.streams[0]);
      rig.mover->drain();
      cudaStreamSynchronize(rig.streams[0]);
    };
    visit(0);
    rig.mover->take_wait_ms();
    rig.mover->take_busy_ms();
    bool right = log.take().first.empty();
    log.keep(10);
    visit(2);
    double busy = rig.mover->take_busy_ms();
    std::vector<hift::Interval> copies = log.take().first;
    right = right && copies.size() == 2;
    if (!right) return false;
    const double anchored = ms(copies[0].begin.time_since_epoch());
    right = copies[0].kind == Kind::kIn && copies[1].kind == Kind::kOut &&
            copies[0].end <= copies[1].begin && copies[1].page == 2 && copies[1].group == 0 &&
            copies[0].bytes == kElements * 4;
    const auto length = [](const hift::Interval& i) { return ms(i.end - i.begin); };
    right = right && std::abs(length(copies[0]) + length(copies[1]) - busy) < 1e-3;
    rig.mover->take_wait_ms();
    const auto waits = log.take().first;
    right = right && waits.size() == 1 && waits[0].kind == Kind::kWait;
    // The clock goes on from the same anchor: the next page comes after, by simulated time.
    visit(1);
    rig.mover->take_busy_ms();
    const auto later = log.take().first;
    return right && later.size() == 2 && later[0].begin >= copies[1].end &&
           ms(later[1].end.time_since_epoch()) - anchored <=
               0.01 * static_cast<double>(stats().operations);
  });
}

}  // namespace

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
