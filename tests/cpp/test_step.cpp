// SPDX-License-Identifier: Apache-2.0
// The pool of threads, for ThreadSanitizer: several callers at once, a pool that grows, the
// caller's rounding mode in every worker, forks. Arithmetic is tested from Python.
#include <sys/wait.h>
#include <unistd.h>

#include <atomic>
#include <cfenv>
#include <functional>
#include <mutex>
#include <set>
#include <thread>
#include <utility>
#include <vector>

#include "check.h"
#include "cpu/pool.h"
#include "cpu/step.h"

namespace {

using hift::cpu::parallel_for;

/// Unguarded writes: ThreadSanitizer sees ranges that overlap and a caller that reads too early.
void fill(std::vector<int>& to, int value, int threads) {
  parallel_for(static_cast<std::int64_t>(to.size()), 64, threads,
               [&](std::int64_t begin, std::int64_t end) {
                 for (std::int64_t i = begin; i < end; ++i) to[i] += value;
               });
}

bool all_are(const std::vector<int>& values, int value) {
  for (const int v : values) {
    if (v != value) return false;
  }
  return true;
}

/// w += 1 on every element, by the sgd rule.
void step(std::vector<float>& weights, const std::vector<float>& ones, int threads) {
  hift::Span span;
  span.param = weights.data();
  span.grad = ones.data();
  span.count = static_cast<std::int64_t>(weights.size());
  span.rule = hift::cpu::rule_number("sgd");
  span.hyper[1] = -1.0f;
  hift::cpu::step(&span, 1, {}, threads);
}

TEST(every_element_is_visited_once) {
  for (const int threads : {1, 2, 3, 7}) {
    for (const int count : {0, 1, 63, 64, 65, 127, 129, 448, 449, 1000, 4097}) {
      std::vector<int> visits(count);
      fill(visits, 1, threads);
      CHECK(all_are(visits, 1), count, " elements on ", threads, " threads");
    }
  }
}

TEST(ranges_are_grains) {
  std::mutex mutex;
  std::set<std::pair<std::int64_t, std::int64_t>> ranges;
  const auto note = [&](std::int64_t begin, std::int64_t end) {
    const std::lock_guard<std::mutex> lock(mutex);
    ranges.insert({begin, end});
  };
  parallel_for(1000, 384, 3, note);
  using Ranges = std::set<std::pair<std::int64_t, std::int64_t>>;
  CHECK(ranges == (Ranges{{0, 384}, {384, 768}, {768, 1000}}), ranges.size(), " ranges");
  ranges.clear();
  parallel_for(1000, 384, 1, note);
  CHECK(ranges == (Ranges{{0, 1000}}), ranges.size(), " ranges");
}

/// Calls `visit` on `threads` threads at once: no range ends before all have begun.
void on_every_thread(int threads, const std::function<void()>& visit) {
  std::atomic<int> arrived{0};
  parallel_for(threads, 1, threads, [&](std::int64_t, std::int64_t) {
    visit();
    ++arrived;
    while (arrived < threads) std::this_thread::yield();
  });
}

TEST(workers_share_the_work) {
  std::mutex mutex;
  std::set<std::thread::id> seen;
  for (int round = 0; round < 20; ++round) {
    on_every_thread(4, [&] {
      const std::lock_guard<std::mutex> lock(mutex);
      seen.insert(std::this_thread::get_id());
    });
  }
  CHECK(seen.size() == 4, seen.size(), " threads");
}

TEST(a_thread_that_is_held_up_leaves_its_share) {
  // One range lasts until all others are done: whoever took it, the rest is the other thread's.
  std::atomic<int> done{0};
  parallel_for(100, 1, 2, [&](std::int64_t begin, std::int64_t) {
    while (begin == 0 && done < 99) std::this_thread::yield();
    ++done;
  });
  CHECK(done == 100, done);
}

TEST(callers_take_turns) {
  std::vector<std::thread> callers;
  std::vector<std::vector<int>> values(4, std::vector<int>(1000));
  for (int c = 0; c < 4; ++c) {
    callers.emplace_back([&, c] {
      // Each caller asks for another number, so that the pool grows and shrinks between them.
      for (int round = 1; round <= 200; ++round) {
        fill(values[c], 1, 1 + (c + round) % 4);
        if (!all_are(values[c], round)) return;
      }
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const auto& v : values) CHECK(all_are(v, 200), v[0]);
}

TEST(steps_from_several_callers) {
  constexpr int kCount = 100000;
  const std::vector<float> ones(kCount, 1.0f);
  std::vector<std::vector<float>> weights(3, std::vector<float>(kCount));
  std::vector<std::thread> callers;
  for (auto& w : weights) {
    callers.emplace_back([&] {
      for (int round = 0; round < 10; ++round) step(w, ones, 3);
    });
  }
  for (std::thread& caller : callers) caller.join();
  for (const auto& w : weights) CHECK(w == std::vector<float>(kCount, 10.0f), w[0]);
}

TEST(workers_take_the_callers_rounding) {
  const auto modes = [](int threads) {
    std::atomic<int> upward{0}, ranges{0};
    on_every_thread(threads, [&] {
      upward += std::fegetround() == FE_UPWARD;
      ++ranges;
    });
    return std::make_pair(upward.load(), ranges.load());
  };
  CHECK(modes(4) == std::make_pair(0, 4));
  std::fesetround(FE_UPWARD);
  const auto up = modes(4);
  std::fesetround(FE_TONEAREST);
  CHECK(up == std::make_pair(4, 4), up.first, " of ", up.second, " round upward");
  CHECK(modes(4) == std::make_pair(0, 4));
}

#if !defined(__SANITIZE_THREAD__)  // which does not follow threads made after a fork
TEST(forked_children_have_workers_of_their_own) {
  std::vector<int> values(1000);
  fill(values, 1, 3);
  std::atomic<bool> stop{false};
  std::thread other([&] {
    std::vector<int> mine(1000);
    while (!stop) fill(mine, 1, 3);
  });
  for (int round = 0; round < 50; ++round) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(60);  // a child that hangs ends with a signal
      fill(values, 1, 3);
      fill(values, 1, 2);
      _exit(all_are(values, 3) ? 0 : 1);
    }
    int status = -1;
    waitpid(child, &status, 0);
    CHECK(status == 0, "child ", round, " ended with ", status);
  }
  stop = true;
  other.join();
  fill(values, 1, 3);
  CHECK(all_are(values, 2), values[0]);
}
#endif

}  // namespace

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
