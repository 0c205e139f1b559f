// SPDX-License-Identifier: Apache-2.0
// Lanes in lockstep on the host: shuffles hand over what they should, and what would hang or give
// garbage on a GPU ends the program, which is tried in a child process.
#include "host_kernel.h"

#include <sys/wait.h>
#include <unistd.h>

#include <cmath>
#include <cstdint>

#include "check.h"
#include "cuda/warp.h"

namespace {

using namespace hift::cuda;

struct Output {
  std::int64_t* to;
};

void shuffles(Output out) {
  const auto me = static_cast<std::int64_t>(threadIdx.x);
  std::int64_t value = 1000 * blockIdx.x + me;
  for (int mask = 16; mask > 0; mask /= 2) value = value * 64 + shuffle_xor(me, mask);
  value += shuffle(value, static_cast<int>(me + 3) % 32) % 7;
  out.to[blockIdx.x * 96 + threadIdx.x] = value;
}

TEST(each_lane_gets_its_partners_value) {
  std::int64_t found[3 * 96] = {};
  launch(shuffles, 3, 96, nullptr, Output{found});
  for (int block = 0; block < 3; ++block) {
    std::int64_t values[96];
    for (int thread = 0; thread < 96; ++thread) {
      values[thread] = 1000 * block + thread;
      for (int mask = 16; mask > 0; mask /= 2)
        values[thread] = values[thread] * 64 + (thread ^ mask);
    }
    for (int thread = 0; thread < 96; ++thread) {
      const int from = thread / 32 * 32 + (thread + 3) % 32;
      CHECK(found[block * 96 + thread] == values[thread] + values[from] % 7, block, " ", thread);
    }
  }
}

void maxima(Output out) {
  const float mine = threadIdx.x == 21 ? NAN : std::abs(static_cast<float>(threadIdx.x) - 11.5f);
  out.to[threadIdx.x] = static_cast<std::int64_t>(2 * warp_max(mine));
}

TEST(the_largest_value_reaches_every_lane) {
  std::int64_t found[64] = {};
  launch(maxima, 1, 64, nullptr, Output{found});
  for (int thread = 0; thread < 64; ++thread) CHECK(found[thread] == (thread < 32 ? 39 : 103));
}

void without(Output out) { out.to[threadIdx.x] = threadIdx.x + 1; }

TEST(kernels_without_shuffles_need_no_full_warp) {
  std::int64_t found[37] = {};
  launch(without, 1, 37, nullptr, Output{found});
  for (int thread = 0; thread < 37; ++thread) CHECK(found[thread] == thread + 1);
}

#ifndef __SANITIZE_THREAD__  // whose fibers do not outlive a fork
void by_some(Output) {
  if (threadIdx.x != 9) shuffle_xor(1.0f, 1);
}
void by_others(Output) {
  if (threadIdx.x != 0) shuffle_xor(1.0f, 1);
}
void by_a_mask(Output) { __shfl_xor_sync(0xffffu, 1.0f, 1); }
void beyond(Output) { shuffle(1.0f, 32); }
void by_all(Output) { shuffle(1.0f, 31); }

/// Whether a launch ends the program as a shuffle gone wrong does.
bool dies(void (*kernel)(Output), int threads) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    if (std::freopen("/dev/null", "w", stderr) == nullptr) _exit(1);
    launch(kernel, 1, threads, nullptr, Output{nullptr});
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFEXITED(status) && WEXITSTATUS(status) == 4;
}

TEST(shuffles_without_all_lanes_are_seen) {
  CHECK(dies(by_some, 32));
  CHECK(dies(by_others, 32));
  CHECK(dies(by_a_mask, 32));
  CHECK(dies(beyond, 32));
  CHECK(dies(by_all, 31));
  CHECK(!dies(by_all, 64));
}
#endif

}  // namespace

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
