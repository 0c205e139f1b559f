// SPDX-License-Identifier: Apache-2.0
// The loops over a span's elements, for every rule. Each instruction set includes them once, under
// its own target pragma and its own HIFT_NS, after every standard header: no inline function is
// shared between them.

#include "core/dtype.h"
#include "core/span.h"
#include "cpu/ahead.inl"
#include "cpu/table.h"
#include "rules/all.h"

namespace hift::HIFT_NS {

/// One element: the rule with as much state as it has.
template <class Rule>
HIFT_FN void apply(float& p, float g, [[maybe_unused]] float* s0, [[maybe_unused]] float* s1,
                   [[maybe_unused]] float* s2, const typename Rule::Hyper& h) {
  if constexpr (Rule::states == 0) {
    Rule::update(p, g, h);
  } else if constexpr (Rule::states == 1) {
    Rule::update(p, g, *s0, h);
  } else if constexpr (Rule::states == 2) {
    Rule::update(p, g, *s0, *s1, h);
  } else {
    Rule::update(p, g, *s0, *s1, *s2, h);
  }
}

}  // namespace hift::HIFT_NS

#include "cpu/stage.inl"
//
#include "cpu/pairs.inl"

namespace hift::HIFT_NS {

/// The direct loop, for state kept as float and weights rounded to nearest.
template <class Rule, class Param, class Grad>
void update_range(const Span& span, std::int64_t begin, std::int64_t end, float grad_factor) {
  static_assert(Rule::states <= kMaxStates && sizeof(typename Rule::Hyper) <= sizeof span.hyper);
  typename Rule::Hyper h;
  memcpy(&h, span.hyper, sizeof h);
  Param* __restrict param = static_cast<Param*>(span.param);
  const Grad* __restrict grad = static_cast<const Grad*>(span.grad);
  [[maybe_unused]] float* __restrict state0 = static_cast<float*>(span.state[0]);
  [[maybe_unused]] float* __restrict state1 = static_cast<float*>(span.state[1]);
  [[maybe_unused]] float* __restrict state2 = static_cast<float*>(span.state[2]);
  const auto ask_ahead = [&](std::int64_t at) HIFT_LAMBDA {
    ask_stretch<Rule::states>(at, param, grad, state0, state1, state2);
  };
  const auto update = [&](std::int64_t from, std::int64_t to) HIFT_LAMBDA {
#pragma omp simd
    for (std::int64_t i = from; i < to; ++i) {
      float p = load(param[i]);
      apply<Rule>(p, load(grad[i]) * grad_factor, &state0[i], &state1[i], &state2[i], h);
      store(param[i], p);
    }
  };
  in_stretches(begin, end, ask_ahead, update);
}

template <class Rule>
constexpr RuleEntry entry() {
  return {Rule::name,
          Rule::states,
          static_cast<int>(sizeof(typename Rule::Hyper) / sizeof(float)),
          non_negative<Rule>,
          {{update_range<Rule, float, float>, nullptr, nullptr},
           {update_range<Rule, BFloat16, float>, update_range<Rule, BFloat16, BFloat16>, nullptr},
           {update_staged<Rule>, nullptr, update_staged<Rule>}},
          {update_pairs<Rule, false>, update_pairs<Rule, true>},
          update_staged<Rule>};
}

const RuleEntry* table() {
#define HIFT_ENTRY(...) entry<__VA_ARGS__>(),
  static constexpr RuleEntry entries[] = {HIFT_RULES(HIFT_ENTRY)};
#undef HIFT_ENTRY
  static_assert(sizeof entries / sizeof entries[0] == kRules);
  return entries;
}

}  // namespace hift::HIFT_NS
