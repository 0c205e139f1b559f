// SPDX-License-Identifier: Apache-2.0
// The kernels for state and weights in fewer bits, run thread by thread on the host, against the
// CPU's own pass: every rule, type and way, counts around a run and a block of codes, misaligned
// addresses, elements beyond 2^32, sentinels around every buffer.
#include "host_kernel.h"

#include "cuda/kept.cu"
#include "cuda/step.cu"

#include <algorithm>
#include <array>
#include <string>
#include <vector>

#include "check.h"
#include "ways.h"

namespace {

using namespace hift;
using namespace hift::generic;
using namespace hift_test;

std::vector<Job> jobs_of(const Way& way) {
  const std::int64_t run = cuda::KeptWork<Sgd>::kRun;
  std::vector<std::int64_t> counts;
  if (way.coded()) {
    counts = {0, 1, 31, 33, 255, 256, 257, 511, 513};
    if (way.rule % 3 == 0 && way.param == way.grad)
      counts.insert(counts.end(), {run - 1, run, run + 257});
  } else {
    for (int i = 0; i <= 2 * cuda::KeptWork<Sgd>::kWidth; ++i) counts.push_back(i);
    for (const std::int64_t near : {run - 1, run, run + 1, 2 * run + 7}) counts.push_back(near);
  }
  const std::int64_t far = std::int64_t{1} << 32;
  std::vector<Job> jobs;
  for (const std::int64_t count : counts) {
    for (int variant = 0; variant < 2; ++variant) {
      std::array<int, 4> offset{};
      if (variant == 1) {  // one operand's address alone, or all
        const auto which = generator() % 5;
        for (unsigned i = 0; i < 4; ++i) {
          if (which == 4 || which == i) offset[i] = 1 + static_cast<int>(generator() % 3);
        }
      }
      const std::array<std::int64_t, 4> firsts{0, 1279, far - 100, 5 * far - 3};
      jobs.push_back(make_job(way, count, pick(firsts), offset));
    }
  }
  return jobs;
}

/// One call each on the host and through the kernels.
void check_jobs(std::vector<Job>& jobs, const Scaling& scaling, const std::string& what) {
  std::vector<Span> there, here;
  for (Job& job : jobs) {
    job.actual = job.expected = job.before;
    there.push_back(job.span);
    job.expected.point(there.back());
    here.push_back(job.span);
    job.actual.point(here.back());
  }
  cpu::step(there.data(), there.size(), scaling, 1);
  cuda::launches.clear();
  cuda::step(here.data(), here.size(), scaling, 0, nullptr);
  bool changed = false;
  for (const Job& job : jobs) {
    CHECK(same(job.actual, job.expected), what, ": wrong bits for ", job.span.count,
          " elements from ", job.span.first, " + ", job.span.shard, " on");
    changed = changed || !same(job.actual, job.before);
  }
  const bool idle = scaling.found_inf != nullptr && *scaling.found_inf != 0.0f;
  CHECK(changed == !idle, what);
}

TEST(every_way_has_the_bits_of_the_host) {
  int ways = 0;
  for (int rule = 0; rule < kRules; ++rule) {
    for (const Way& way : ways_of(rule)) {
      std::vector<Job> jobs = jobs_of(way);
      check_jobs(jobs, {}, way.name());
      ++ways;
    }
  }
  CHECK(ways > 400, ways);
}

TEST(scalars_and_mixed_spans) {
  std::vector<Job> jobs;
  for (int rule = 0; rule < kRules; ++rule) {
    for (const Way& way : ways_of(rule)) jobs.push_back(make_job(way, 70, 0, {1, 0, 0, 0}));
  }
  std::shuffle(jobs.begin(), jobs.end(), generator);
  const float scale = 1536.7f, clip = 0.3141f, zero = 0.0f, one = 1.0f;
  check_jobs(jobs, {}, "plain");
  // A kernel for every pair of types in plain ways, one for values and one for codes otherwise.
  std::size_t kernels = 0;
  for (int rule = 0; rule < kRules; ++rule)
    kernels += 5 + 1 + (cpu::rule(rule).non_negative >= 0 ? 1 : 0);
  CHECK(cuda::launches.size() >= kernels && cuda::launches.size() < 2 * kernels + jobs.size() / 24,
        cuda::launches.size(), " launches for ", kernels, " kernels");
  for (const auto& launch : cuda::launches) CHECK(launch.argument_bytes <= 4096);
  check_jobs(jobs, {&scale, nullptr, &zero}, "scaled");
  check_jobs(jobs, {nullptr, &clip, nullptr}, "clipped");
  check_jobs(jobs, {&scale, &clip, nullptr}, "both");
  check_jobs(jobs, {&scale, &clip, &one}, "overflowed");
}

TEST(aligned_spans_take_wide_accesses) {
  const int rule = cpu::rule_number("adamw");
  using Rule = AdamRule<true>;
  for (const Way& way : ways_of(rule)) {
    Job job = make_job(way, 64, 0, {});
    job.before.point(job.span);
    CHECK(cuda::kept_work_of<Rule>(job.span, 0).packed, way.name());
    for (int operand = 0; operand < 4 && !way.coded(); ++operand) {
      if (operand == 2 && master_size(way.weights) == 0) continue;
      std::array<int, 4> offset{};
      offset[operand] = 2;
      job = make_job(way, 64, 0, offset);
      job.before.point(job.span);
      CHECK(!cuda::kept_work_of<Rule>(job.span, 0).packed, way.name(), ", operand ", operand);
    }
  }
}

TEST(what_does_not_fit_is_refused) {
  const Way way{cpu::rule_number("adamw"), DType::kBFloat16, DType::kBFloat16,
                StateType::kCode8,         Weights::kSplit,  false};
  const auto refused = [&](const char* words, auto change) {
    Job job = make_job(way, 256, 0, {});
    job.before.point(job.span);
    change(job.span);
    CHECK_THROWS(std::invalid_argument, words, cuda::step(&job.span, 1, {}, 0, nullptr));
    CHECK_THROWS(std::invalid_argument, words, cpu::step(&job.span, 1, {}, 1));
  };
  refused("not a multiple", [](Span& s) { s.first = 3; });
  refused("null address", [](Span& s) { s.master = nullptr; });
  refused("null address", [](Span& s) { s.scale[1] = nullptr; });
  refused("not kept", [](Span& s) { s.rule = cpu::rule_number("adagrad"); });
  refused("not one of", [](Span& s) { s.state_type = static_cast<StateType>(9); });
  refused("begin at a word", [](Span& s) { s.state[0] = static_cast<std::byte*>(s.state[0]) + 2; });
}

}  // namespace

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
