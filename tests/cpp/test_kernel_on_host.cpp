// SPDX-License-Identifier: Apache-2.0
// The CUDA kernel and its launcher, run thread by thread on the host, against the rule applied
// element by element: every rule and pair of types, every count and misalignment around the access
// width, sentinels around every buffer.
#include "host_kernel.h"

#include "cuda/kept.cu"
#include "cuda/step.cu"

#include <array>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "buffer.h"

namespace {

using namespace hift;
using namespace hift::generic;
using hift_test::Buffer;

std::mt19937 generator(20240115);

float uniform(float low, float high) {
  return std::uniform_real_distribution<float>(low, high)(generator);
}

template <class... Parts>
void expect(bool ok, const Parts&... parts) {
  if (ok) return;
  std::fprintf(stderr, "test_kernel_on_host: %s\n", text(parts...).c_str());
  std::exit(1);
}

/// A span's buffers: the parameter, the gradient, the states.
using Buffers = std::vector<Buffer>;

struct Job {
  Span span;
  Buffers before, expected, actual;
  void (*apply)(const Span&, Buffers&, float factor);
};

template <class Rule, class Param, class Grad, int... S>
void apply_each(const Span& span, Buffers& to, float factor, std::integer_sequence<int, S...>) {
  typename Rule::Hyper h;
  std::memcpy(&h, span.hyper, sizeof h);
  for (std::int64_t i = 0; i < span.count; ++i) {
    float p = load(to[0].as<Param>()[i]);
    const float g = load(to[1].as<Grad>()[i]) * factor;
    Rule::update(p, g, to[2 + S].template as<float>()[i]..., h);
    store(to[0].as<Param>()[i], p);
  }
}

template <class Rule, class Param, class Grad>
void apply(const Span& span, Buffers& to, float factor) {
  apply_each<Rule, Param, Grad>(span, to, factor, std::make_integer_sequence<int, Rule::states>());
}

template <class T>
constexpr DType dtype_of() {
  return std::is_same_v<T, float>      ? DType::kFloat32
         : std::is_same_v<T, BFloat16> ? DType::kBFloat16
                                       : DType::kFloat16;
}

template <class T>
void fill(Buffer& buffer, std::int64_t count, float low) {
  for (std::int64_t i = 0; i < count; ++i) {
    store(buffer.as<T>()[i], uniform(low, 1.0f) * std::pow(10.0f, uniform(-5.0f, 2.0f)));
  }
}

/// `offsets`: of the parameter, the gradient and the states, in elements.
template <class Rule, class Param, class Grad>
Job make_job(int rule, std::int64_t count, const std::array<int, 2 + kMaxStates>& offsets) {
  Job job;
  job.apply = apply<Rule, Param, Grad>;
  job.before.emplace_back(count, offsets[0], sizeof(Param));
  job.before.emplace_back(count, offsets[1], sizeof(Grad));
  fill<Param>(job.before[0], count, -1.0f);
  fill<Grad>(job.before[1], count, -1.0f);
  for (int s = 0; s < Rule::states; ++s) {
    job.before.emplace_back(count, offsets[2 + s], sizeof(float));
    fill<float>(job.before.back(), count, 0.1f);
  }
  Span& span = job.span;
  span.count = count;
  span.rule = rule;
  span.param_dtype = dtype_of<Param>();
  span.grad_dtype = dtype_of<Grad>();
  span.grad_factor = uniform(0.0f, 1.0f) < 0.5f ? 1.0f : -1.0f;
  for (float& h : span.hyper) {
    const float kind = uniform(0.0f, 4.0f);  // switches are 0 or 1
    h = kind < 1.0f ? 0.0f : kind < 2.0f ? 1.0f : uniform(0.01f, 0.9f);
  }
  return job;
}

/// Every count in 0..2 widths, with every address misaligned alone and all of them alike; runs of a
/// block and beyond.
template <class Rule, class Param, class Grad>
std::vector<Job> jobs_of(int rule) {
  using Work = hift::cuda::Work<Rule, Param, Grad>;
  constexpr int N = Work::kWidth;
  std::vector<std::array<int, 2 + kMaxStates>> misalignments;
  for (int offset = 0; offset < N; ++offset) {
    misalignments.push_back({offset, offset, offset, offset, offset});
    for (int address = 0; offset > 0 && address < 2 + Rule::states; ++address) {
      misalignments.push_back({});
      misalignments.back()[address] = offset;
    }
  }
  std::vector<Job> jobs;
  for (const auto& offsets : misalignments) {
    for (int count = 0; count <= 2 * N; ++count)
      jobs.push_back(make_job<Rule, Param, Grad>(rule, count, offsets));
  }
  for (const std::int64_t count :
       {Work::kRun - 1, Work::kRun, Work::kRun + 1, 2 * Work::kRun + N + 3}) {
    for (const auto& offsets : {misalignments.front(), misalignments.back()}) {
      jobs.push_back(make_job<Rule, Param, Grad>(rule, count, offsets));
    }
  }
  std::shuffle(jobs.begin(), jobs.end(), generator);

  Job whole = make_job<Rule, Param, Grad>(rule, 8, {});
  whole.span.param = whole.before[0].as<void>();
  whole.span.grad = whole.before[1].as<void>();
  for (int s = 0; s < Rule::states; ++s) whole.span.state[s] = whole.before[2 + s].as<float>();
  expect(hift::cuda::work_of<Work>(whole.span, 0).packed, Rule::name,
         ": aligned buffers must take the wide path");
  whole.span.param = whole.before[0].as<Param>() + 1;
  expect(!hift::cuda::work_of<Work>(whole.span, 0).packed, Rule::name,
         ": a misaligned buffer took the wide path");
  return jobs;
}

/// One call of the launcher for all jobs; `factor` is what it should multiply gradients by, or NaN
/// for "do nothing".
void check_jobs(std::vector<Job>& jobs, const Scaling& scaling, float factor,
                const std::string& what) {
  std::vector<Span> spans;
  for (Job& job : jobs) {
    job.actual = job.expected = job.before;
    if (!std::isnan(factor)) job.apply(job.span, job.expected, factor * job.span.grad_factor);
    job.span.param = job.actual[0].as<void>();
    job.span.grad = job.actual[1].as<void>();
    for (std::size_t s = 2; s < job.actual.size(); ++s)
      job.span.state[s - 2] = job.actual[s].as<float>();
    spans.push_back(job.span);
  }
  int tag = 0;
  hift::cuda::launches.clear();
  hift::cuda::devices.clear();
  hift::cuda::step(spans.data(), spans.size(), scaling, 3, &tag);
  for (const Job& job : jobs) {
    expect(job.actual == job.expected, what, ": wrong bits for ", job.span.count,
           " elements, parameter at ", job.span.param, ", gradient at ", job.span.grad,
           ", state at ", job.span.state[0]);
  }
  expect(hift::cuda::devices == std::vector<int>{3}, what, ": the device was not set exactly once");
  for (const hift::cuda::Launch& launch : hift::cuda::launches) {
    expect(launch.argument_bytes <= 4096, what, ": a launch's argument has ", launch.argument_bytes,
           " bytes");
    expect(launch.stream == &tag, what, ": a launch went to another stream");
  }
}

template <class Rule, class Param, class Grad>
void check_pair(int rule, std::vector<Job>& sample) {
  const std::string what = text(Rule::name, ", parameter ", static_cast<int>(dtype_of<Param>()),
                                ", gradient ", static_cast<int>(dtype_of<Grad>()));
  std::vector<Job> jobs = jobs_of<Rule, Param, Grad>(rule);
  const float scale = 1536.7f, clip = 0.3141f, zero = 0.0f, one = 1.0f;
  check_jobs(jobs, {}, 1.0f, what);
  std::size_t filled = 0;
  for (const Job& job : jobs) filled += job.span.count > 0;
  const int capacity = hift::cuda::Table<hift::cuda::Work<Rule, Param, Grad>>::kCapacity;
  expect(hift::cuda::launches.size() == (filled + capacity - 1) / capacity, what, ": ",
         hift::cuda::launches.size(), " launches for ", filled, " spans");

  jobs.resize(jobs.size() / 4);  // the scalars are the same for every shape
  check_jobs(jobs, {&scale, nullptr, &zero}, static_cast<float>(1.0 / scale), what + ", scaled");
  check_jobs(jobs, {nullptr, &clip, nullptr}, clip, what + ", clipped");
  check_jobs(jobs, {&scale, &clip, nullptr}, static_cast<float>(double{clip} / scale),
             what + ", both");
  check_jobs(jobs, {&scale, &clip, &one}, std::nanf(""), what + ", overflowed");
  sample.insert(sample.end(), jobs.begin(), jobs.begin() + 12);
}

template <class Rule>
void check_rule(int rule, std::vector<Job>& sample) {
  check_pair<Rule, float, float>(rule, sample);
  check_pair<Rule, BFloat16, BFloat16>(rule, sample);
  check_pair<Rule, Float16, Float16>(rule, sample);
  check_pair<Rule, BFloat16, float>(rule, sample);
  check_pair<Rule, Float16, float>(rule, sample);
}

/// A block whose elements lie beyond 2^33: the span is a fiction, but the block's own elements are
/// real.
void check_far_block() {
  using Work = hift::cuda::Work<Adagrad, float, float>;
  constexpr std::uint32_t block = (std::int64_t{1} << 33) / Work::kRun + 5;
  const std::int64_t begin = block * Work::kRun, count = 1029;
  Job job = make_job<Adagrad, float, float>(0, count, {});
  job.actual = job.expected = job.before;
  job.apply(job.span, job.expected, job.span.grad_factor);

  hift::cuda::Table<Work> table{};
  table.size = 1;
  table.work[0] = hift::cuda::work_of<Work>(job.span, 0);
  const auto shifted = [&](int i) {
    return reinterpret_cast<float*>(reinterpret_cast<std::uintptr_t>(job.actual[i].as<float>()) -
                                    4 * begin);
  };
  table.work[0].param = shifted(0);
  table.work[0].grad = shifted(1);
  table.work[0].state[0] = shifted(2);
  table.work[0].count = begin + count;
  blockIdx.x = block;
  for (threadIdx.x = 0; threadIdx.x < hift::cuda::kThreads; ++threadIdx.x)
    hift::cuda::update_spans(table);
  expect(job.actual == job.expected, "wrong bits beyond 2^33 elements");
}

template <class Change>
void check_refused(const char* what, const Change& change) {
  int sgd = 0;
  while (std::strcmp(hift::cuda::kEntries[sgd].name, Sgd::name) != 0) ++sgd;
  Job job = make_job<Sgd, float, float>(sgd, 4, {});
  job.span.param = job.before[0].as<void>();
  job.span.grad = job.before[1].as<void>();
  change(job.span);
  bool refused = false;
  try {
    hift::cuda::step(&job.span, 1, {}, 0, nullptr);
  } catch (const std::invalid_argument&) {
    refused = true;
  }
  expect(refused, what, " was not refused");
}

}  // namespace

int main() {
  std::vector<Job> sample;
  int rule = 0;
#define HIFT_CHECK(...) check_rule<__VA_ARGS__>(rule++, sample);
  HIFT_RULES(HIFT_CHECK)
#undef HIFT_CHECK

  std::shuffle(sample.begin(), sample.end(), generator);
  check_jobs(sample, {}, 1.0f, "all rules and types in one call");
  expect(hift::cuda::launches.size() == static_cast<std::size_t>(kRules) * 5,
         "one launch for every kernel, not ", hift::cuda::launches.size());

  check_far_block();
  check_refused("a negative rule", [](Span& s) { s.rule = -1; });
  check_refused("a rule past the list", [](Span& s) { s.rule = kRules; });
  check_refused("an unknown type", [](Span& s) { s.grad_dtype = static_cast<DType>(7); });
  check_refused("an unpaired type", [](Span& s) { s.grad_dtype = DType::kBFloat16; });
  check_refused("a negative count", [](Span& s) { s.count = -4; });
  check_refused("a null address", [](Span& s) { s.grad = nullptr; });
  check_refused("a span beyond a grid",
                [](Span& s) { s.count = std::numeric_limits<std::int64_t>::max(); });
  std::printf("test_kernel_on_host: %d rules passed\n", rule);
  return 0;
}
