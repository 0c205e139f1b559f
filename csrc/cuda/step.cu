// SPDX-License-Identifier: Apache-2.0
// Sorts spans by rule and types, fills tables with them, and launches. No tensor gets a launch of
// its own, and nothing here waits for the GPU.
#include "cuda/step.h"

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <vector>

#include "core/check.h"
#include "core/kept.h"
#include "cuda/kept.h"
#include "cuda/tables.h"

namespace hift::cuda {
namespace {

template <class Work>
Work work_of(const Span& s, std::uint32_t first_block) {
  Work w{};
  w.param = static_cast<typename Work::Param*>(s.param);
  w.grad = static_cast<const typename Work::Grad*>(s.grad);
  w.count = s.count;
  std::memcpy(&w.hyper, s.hyper, sizeof w.hyper);
  w.grad_factor = s.grad_factor;
  w.first_block = first_block;
  w.packed = aligned<Work::kWidth>(w.param) && aligned<Work::kWidth>(w.grad);
  for (int i = 0; i < Work::Rule::states; ++i) {
    w.state[i] = static_cast<float*>(s.state[i]);
    w.packed = w.packed && aligned<Work::kWidth>(w.state[i]);
  }
  return w;
}

/// Updates `count` spans of one rule and one pair of types.
template <class Rule, class Param, class Grad>
void run(const Span* const* spans, std::size_t count, const Scaling& scaling, void* stream,
         int* launches) {
  using Work = Work<Rule, Param, Grad>;
  run_table(update_spans<Table<Work>>, work_of<Work>, spans, count, scaling, stream, launches);
}

struct Entry {
  const char* name;
  int states;
  int non_negative;
  decltype(&run<Sgd, float, float>)
      run[3][3];  // [parameter's DType][gradient's DType]; null where not offered
};

template <class Rule>
constexpr Entry entry() {
  return {Rule::name,
          Rule::states,
          non_negative<Rule>,
          {{run<Rule, float, float>, nullptr, nullptr},
           {run<Rule, BFloat16, float>, run<Rule, BFloat16, BFloat16>, nullptr},
           {run<Rule, Float16, float>, nullptr, run<Rule, Float16, Float16>}}};
}

#define HIFT_ENTRY(...) entry<__VA_ARGS__>(),
constexpr Entry kEntries[] = {HIFT_RULES(HIFT_ENTRY)};
#undef HIFT_ENTRY

void check_span(const Span& s) {
  check_argument(s.rule >= 0 && s.rule < kRules, "rule ", s.rule, " is not in the list of ",
                 kRules);
  const Entry& rule = kEntries[s.rule];
  const int p = static_cast<int>(s.param_dtype), g = static_cast<int>(s.grad_dtype);
  check_argument(p >= 0 && p < 3 && g >= 0 && g < 3 && rule.run[p][g] != nullptr, "rule ",
                 rule.name, " has no kernel for parameter type ", p, " with gradient type ", g);
  check_argument(s.count >= 0, "a span's count must not be negative: ", s.count);
  check_kept(s, rule.name, rule.states, rule.non_negative);
}

/// Spans of one number go into one launch: kernels of their own have those whose numbers are kept
/// as they are computed, rounded to nearest.
int kernel_of(const Span& s) {
  const bool plain = s.state_type == StateType::kFloat32 || kEntries[s.rule].states == 0;
  if (!plain || s.weights != Weights::kNearest) return kRules * 9 + kept_kernel(s);
  return (s.rule * 3 + static_cast<int>(s.param_dtype)) * 3 + static_cast<int>(s.grad_dtype);
}

}  // namespace

void step(const Span* spans, std::size_t count, const Scaling& scaling, int device, void* stream) {
  std::vector<const Span*> order;
  order.reserve(count);
  for (std::size_t i = 0; i < count; ++i) {
    check_span(spans[i]);
    if (spans[i].count > 0) order.push_back(&spans[i]);
  }
  if (order.empty()) return;
  std::stable_sort(order.begin(), order.end(),
                   [](const Span* a, const Span* b) { return kernel_of(*a) < kernel_of(*b); });

  const DeviceGuard guard(device);
  int launches = 0;
  try {
    for (std::size_t begin = 0, end = 0; begin < order.size(); begin = end) {
      const Span& first = *order[begin];
      while (end < order.size() && kernel_of(*order[end]) == kernel_of(first)) ++end;
      const auto& kernels = kEntries[first.rule].run[static_cast<int>(first.param_dtype)];
      const auto own = kernels[static_cast<int>(first.grad_dtype)];
      const auto kernel = kernel_of(first) < kRules * 9 ? own : run_kept;
      kernel(&order[begin], end - begin, scaling, stream, &launches);
    }
  } catch (const std::exception& error) {
    if (launches == 0) throw;
    throw std::runtime_error(
        text("the step stopped after ", launches,
             " of its kernels; repeat it only from a checkpoint. Cause: ", error.what()));
  }
}

}  // namespace hift::cuda
