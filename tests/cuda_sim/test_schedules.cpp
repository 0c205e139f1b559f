// SPDX-License-Identifier: Apache-2.0
// The whole engine on a simulated device, in many orders that CUDA allows: every one must give the
// bits of the host. Arguments: number of schedules (1000), first seed (1), or `faults`.
#include <cstdio>
#include <cstdlib>
#include <cstring>

#include "check.h"
#include "rig.h"

namespace {

using namespace hift_sim;

int schedules = 1000;
unsigned first_seed = 1;

void check_clean(const Stats& before, const std::string& where) {
  const Stats after = stats();
  CHECK(after.error.empty(), where, ": ", after.error);
  CHECK(after.pageable_copies == 0, where, ": ", after.pageable_copies, " pageable copies");
  CHECK(after.device_blocks == before.device_blocks && after.streams == before.streams &&
            after.events == before.events && after.registrations == before.registrations,
        where, ": left behind ", after.device_blocks - before.device_blocks, " blocks, ",
        after.streams - before.streams, " streams, ", after.events - before.events, " events, ",
        after.registrations - before.registrations, " registrations");
}

void run(const Setting& setting, unsigned seed, int steps = kSteps) {
  begin(schedule_of(seed));
  const Stats before = stats();
  const std::string where =
      hift::text("seed ", seed, ", store ", setting.store, ", pages of ", setting.page_bytes,
                 ", staging ", setting.staging, setting.kept ? ", in fewer bits" : "");
  {
    Training training(setting);
    for (int s = 0; s < steps; ++s) training.step(s);
    // What was flushed is read from the store without another wait.
    if (seed / 8 % 2 == 1) training.engine().flush();
    CHECK(training.outcome(seed / 8 % 3 == 0) == expected(steps, setting.kept), where,
          ": other bits than on the host");
  }
  check_clean(before, where);
}

/// The training ends in mid-air: pages are on their way in and out when the engine goes.
void stop(const Setting& setting, unsigned seed) {
  begin(schedule_of(seed));
  const Stats before = stats();
  {
    Training training(setting);
    for (int s = 0; s < 4; ++s) training.step(s);
  }
  check_clean(before, hift::text("stopped, seed ", seed, ", store ", setting.store, ", pages of ",
                                 setting.page_bytes, ", staging ", setting.staging));
}

TEST(ends_at_any_time) {
  for (const std::string store : {"ram", "disk"}) {
    const std::vector<Setting> all = settings(store);
    for (int i = 0; i < (schedules + 4) / 5; ++i) stop(all[i % all.size()], first_seed + i);
  }
}

TEST(a_flush_brings_state_home) {
  const std::vector<Setting> all = settings("ram");
  for (int i = 0; i < (schedules + 9) / 10; ++i) {
    begin(schedule_of(first_seed + i));
    Training training(all[i % all.size()]);
    for (int s = 0; s < kSteps - 1; ++s) training.step(s);
    // A view that was taken before the last step, which changes what it shows.
    std::shared_ptr<hift::Slab> owner;
    const std::byte* view = training.engine().address(2, 0, 0, &owner);
    training.step(kSteps - 1);
    training.engine().flush();
    const std::vector<float>& values = expected().first[kGroups[0].size() + kGroups[1].size()];
    CHECK(std::memcmp(view, values.data(), values.size() * sizeof(float)) == 0, "seed ",
          first_seed + i);
  }
}

TEST(ram) {
  const std::vector<Setting> all = settings("ram");
  for (int i = 0; i < schedules; ++i) run(all[i % all.size()], first_seed + i);
}

TEST(disk) {
  const std::vector<Setting> all = settings("disk");
  for (int i = 0; i < (schedules + 9) / 10; ++i) run(all[i % all.size()], first_seed + i);
}

TEST(numbers_in_fewer_bits) {
  for (const std::string store : {"ram", "disk"}) {
    std::vector<Setting> all = settings(store);
    for (Setting& s : all) s.kept = true;
    const int share = store == "ram" ? 5 : 20;
    for (int i = 0; i < (schedules + share - 1) / share; ++i)
      run(all[i % all.size()], first_seed + i);
  }
}

}  // namespace

int main(int argc, char** argv) {
  if (argc > 1) schedules = std::atoi(argv[1]);
  if (argc > 2) first_seed = static_cast<unsigned>(std::atoi(argv[2]));
  char* none[] = {argv[0]};
  return hift_test::run_tests(1, none);
}
