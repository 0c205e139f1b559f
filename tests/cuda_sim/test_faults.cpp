// SPDX-License-Identifier: Apache-2.0
// Every call of the runtime fails once, in turn: there is an exception or the right result, no page
// is lost, and nothing is left behind. What failed is tried again, unless the message forbids it.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "check.h"
#include "rig.h"

namespace {

using namespace hift_sim;

int stride = 1;
int first_call = 0;

/// Whether every value is the one of either outcome.
bool between(const std::vector<std::vector<float>>& found, const std::vector<std::vector<float>>& a,
             const std::vector<std::vector<float>>& b) {
  for (std::size_t i = 0; i < found.size(); ++i) {
    for (std::size_t k = 0; k < found[i].size(); ++k) {
      if (found[i][k] != a[i][k] && found[i][k] != b[i][k]) return false;
    }
  }
  return true;
}

struct Tally {
  std::int64_t calls = 0, thrown = 0, stopped = 0, completed = 0;
};

/// Trains with one call failing. Returns false if no call was left to fail.
bool run(const Setting& setting, std::int64_t call, Tally* tally) {
  begin(schedule_of(static_cast<unsigned>(call)));
  const std::string where = hift::text("call ", call, ", store ", setting.store, ", pages of ",
                                       setting.page_bytes, ", staging ", setting.staging);
  const Stats before = stats();
  bool reached = false;
  fail_call(call);
  try {
    Training training(setting);
    int s = 0, failures = 0;
    bool stopped = false;
    std::string why;
    while (s < kSteps && !stopped) {
      try {
        training.step(s);
        ++s;
      } catch (const std::exception& error) {
        ++tally->thrown;
        why = error.what();
        stopped = std::strstr(error.what(), "only from a checkpoint") != nullptr;
        CHECK(++failures <= 2, where, ": one failing call, and step ", s,
              " fails again: ", error.what());
        if (failures > 2) return true;
      }
    }
    const auto outcome = [&] {
      try {
        return training.outcome();
      } catch (const std::exception&) {
        ++tally->thrown;
        return training.outcome();
      }
    }();
    if (stopped) {
      ++tally->stopped;
      const Outcome &old = expected(s), &done = expected(s + 1);
      CHECK(between(outcome.params, old.params, done.params) &&
                between(outcome.first, old.first, done.first) &&
                between(outcome.second, old.second, done.second),
            where, ": a value of neither before nor after step ", s, ", after ",
            stats().failed_call, ": ", why);
    } else {
      ++tally->completed;
      CHECK(outcome == expected(), where, ": other bits than on the host, after ",
            stats().failed_call, ": ", why);
    }
    reached = stats().calls > call;
  } catch (const std::exception&) {
    // The training could not begin.
    ++tally->thrown;
    reached = true;
  }
  const Stats after = stats();
  CHECK(after.error.empty(), where, ": ", after.error);
  CHECK(after.device_blocks == before.device_blocks && after.streams == before.streams &&
            after.events == before.events && after.registrations == before.registrations,
        where, ": something is left behind");
  ++tally->calls;
  return reached;
}

TEST(every_call_may_fail) {
  for (const std::string store : {"ram", "disk"}) {
    for (const Setting& setting : settings(store)) {
      Tally tally;
      for (std::int64_t call = first_call; run(setting, call, &tally); call += stride) {
      }
      std::printf(
          "%s, pages of %ld, staging %ld: %ld calls failed, %ld errors, %ld steps stopped "
          "midway, %ld trainings completed\n",
          store.c_str(), static_cast<long>(setting.page_bytes), static_cast<long>(setting.staging),
          static_cast<long>(tally.calls), static_cast<long>(tally.thrown),
          static_cast<long>(tally.stopped), static_cast<long>(tally.completed));
      // Most calls matter; those that only measure time may fail in silence.
      CHECK(tally.calls * stride > 100 && 4 * tally.thrown > tally.calls, tally.thrown, " of ",
            tally.calls);
      CHECK(tally.completed > 0, "no training survived");
    }
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) stride = std::atoi(argv[1]);
  if (argc > 2) first_call = std::atoi(argv[2]);
  char* none[] = {argv[0]};
  return hift_test::run_tests(1, none);
}
