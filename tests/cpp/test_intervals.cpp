// SPDX-License-Identifier: Apache-2.0
// The log of intervals: off by default, bounded, safe from any thread; and what the host's mover
// and engine write to it.
#include "core/intervals.h"

#include <cmath>
#include <map>
#include <thread>

#include "cpu/step.h"
#include "engine.h"
#include "mover_rig.h"

namespace {

using namespace hift_test;
using Kind = Interval::Kind;

TEST(it_is_off_until_asked_and_again_after) {
  IntervalLog log;
  log.add({});
  CHECK(!log.on() && log.take().first.empty());
  log.keep(2);
  log.add({Kind::kOut, 1, 7, 100});
  CHECK(log.on());
  log.keep(0);
  log.add({});
  CHECK(!log.on());
  const auto [intervals, lost] = log.take();
  CHECK(intervals.empty() && lost == 0, intervals.size(), " ", lost);
  CHECK_THROWS(std::invalid_argument, "-1", log.keep(-1));
}

TEST(it_keeps_the_first_and_counts_the_rest) {
  IntervalLog log;
  log.keep(2);
  for (std::int64_t p = 0; p < 5; ++p) log.add({Kind::kIn, 0, p});
  const auto [intervals, lost] = log.take();
  CHECK(intervals.size() == 2 && intervals[1].page == 1 && lost == 3, intervals.size(), " ", lost);
  log.add({Kind::kIn, 0, 9});
  const auto [more, none] = log.take();
  CHECK(more.size() == 1 && more[0].page == 9 && none == 0);
}

TEST(threads_write_while_it_is_switched_and_taken) {
  IntervalLog log;
  std::vector<std::thread> threads;
  for (int t = 0; t < 3; ++t) {
    threads.emplace_back([&log, t] {
      for (int i = 0; i < 2000; ++i) {
        if (log.on()) log.add({Kind::kUpdate, t, i});
      }
    });
  }
  std::size_t seen = 0;
  for (int i = 0; i < 200; ++i) {
    log.keep(i % 3 == 0 ? 0 : 50);
    seen += log.take().first.size();
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(seen <= 200 * 50);
}

TEST(the_mover_tells_its_copies_and_waits) {
  Rig rig(2);
  IntervalLog log;
  rig.mover->log_to(log);
  rig.fetch(0, 0);
  rig.mover->drain();
  CHECK(log.take().first.empty());

  log.keep(10);
  const auto before = Clock::now();
  rig.gate.shut("r");
  rig.fetch(3, 0);
  std::thread opener([&] {
    sleep_ms(20);
    rig.gate.open();
  });
  const double waited = rig.mover->await(0, nullptr);
  opener.join();
  rig.write_back(3, 0);
  rig.mover->drain();
  const auto [all, lost] = log.take();
  std::map<Kind, Interval> of;
  for (const Interval& i : all) of[i.kind] = i;
  CHECK(all.size() == 3 && of.size() == 3 && lost == 0, all.size());
  for (const Interval& i : all)
    CHECK(before <= i.begin && i.begin <= i.end && i.end <= Clock::now());
  for (const Kind kind : {Kind::kIn, Kind::kOut}) {
    CHECK(of[kind].group == 0 && of[kind].page == 3 && of[kind].bytes == kRecord);
  }
  CHECK(of[Kind::kIn].end <= of[Kind::kOut].begin);
  CHECK(of[Kind::kIn].end - of[Kind::kIn].begin >= std::chrono::milliseconds(15));
  CHECK(of[Kind::kWait].page == -1);
  const std::chrono::duration<double, std::milli> wait =
      of[Kind::kWait].end - of[Kind::kWait].begin;
  CHECK(waited >= 15 && wait.count() == waited, waited, " ", wait.count());
}

TEST(a_copy_that_fails_is_told_too) {
  Rig rig(1);
  IntervalLog log;
  rig.mover->log_to(log);
  log.keep(10);
  rig.faults.fail_read(1, EIO);
  rig.fetch(2, 0);
  CHECK_THROWS(Failure, "", rig.mover->drain());
  const auto intervals = log.take().first;
  CHECK(intervals.size() == 1 && intervals[0].kind == Kind::kIn && intervals[0].page == 2);
}

/// Two visits of one parameter of eight pages; the intervals of the second, by kind.
std::map<Kind, std::vector<Interval>> visited(const char* store, std::int64_t staging) {
  EngineOptions options;
  options.store = store;
  options.page_bytes = 8192;
  options.staging = staging;
  Engine engine({{4, 0}, {4, 0}}, options);
  engine.add_groups({{8 * 1024}, {1}});
  std::vector<float> param(8 * 1024), grad(8 * 1024, 1.0f);
  Update u;
  u.param = param.data();
  u.grad = grad.data();
  u.rule = cpu::rule_number("adamw");
  u.hypers = cpu::rule(u.rule).hypers;
  u.hyper.fill(0.5f);
  StepReport report;
  for (int visit = 0; visit < 2; ++visit) {
    if (visit == 1) {
      engine.flush();
      engine.intervals().keep(100);
    }
    report = engine.step(0, {u}, {}, 1, 0);
  }
  engine.flush();
  std::map<Kind, std::vector<Interval>> of;
  double update_ms = 0;
  for (const Interval& i : engine.intervals().take().first) {
    of[i.kind].push_back(i);
    if (i.kind == Kind::kUpdate)
      update_ms += std::chrono::duration<double, std::milli>(i.end - i.begin).count();
  }
  CHECK(std::abs(update_ms - report.update_ms) < 1e-9, update_ms, " ", report.update_ms);
  return of;
}

TEST(the_engine_tells_updates_in_place) {
  auto of = visited("ram", EngineOptions::kWholeGroup);
  CHECK(of.size() == 1 && of[Kind::kUpdate].size() == 1);
}

TEST(the_engine_tells_what_streams_through_a_ring) {
  auto of = visited("disk", 3 * 8192);
  CHECK(of[Kind::kUpdate].size() == 8, of[Kind::kUpdate].size());
  CHECK(of[Kind::kOut].size() == 8, of[Kind::kOut].size());
  // Of eight pages three were in the ring, and as many come in for the next step.
  CHECK(of[Kind::kIn].size() >= 5, of[Kind::kIn].size());
  std::map<std::int64_t, Interval> out;
  for (const Interval& i : of[Kind::kOut]) out[i.page] = i;
  CHECK(out.size() == 8);
  for (std::int64_t p = 0; p < 8; ++p) {
    CHECK(out[p].bytes == 8192 && out[p].group == 0);
    CHECK(of[Kind::kUpdate][static_cast<std::size_t>(p)].end <= out[p].begin);
  }
}

}  // namespace

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
