// SPDX-License-Identifier: Apache-2.0
// What a rule is: a struct with `name`, `states`, a `Hyper` of floats and one inline `update` on
// plain floats. Rules know arithmetic and nothing else. HIFT_NS keeps one copy of them per
// instruction set (see cpu/loop.inl).
#pragma once

#include <cmath>
#include <cstdint>

#ifndef HIFT_NS
#define HIFT_NS generic
#endif

#if defined(__CUDACC__)
#define HIFT_FN __host__ __device__ __forceinline__
#else
#define HIFT_FN inline __attribute__((always_inline))
#endif

namespace hift::HIFT_NS {

/// The states that a rule says are never below zero, a bit each: their 8-bit codes need no sign. -1
/// for a rule that does not say: its state is not kept in codes.
template <class Rule, class = void>
inline constexpr int non_negative = -1;
template <class Rule>
inline constexpr int non_negative<Rule, decltype(void(Rule::non_negative))> = Rule::non_negative;

template <class Rule>
inline constexpr bool codes = non_negative<Rule> >= 0;
template <class Rule>
constexpr bool signed_state(int state) {
  return (non_negative<Rule> >> state & 1) == 0;
}

/// torch.lerp's formula: from the nearer end, so that weight 0 and 1 give the ends exactly.
HIFT_FN float lerp(float start, float end, float weight) {
  const bool near_start = weight < 0.5f;
  const float coefficient = near_start ? weight : weight - 1.0f;
  return fmaf(coefficient, end - start, near_start ? start : end);
}

/// Gradient with the L2 penalty added, as torch's `grad.add(param, alpha=weight_decay)`; 0 leaves
/// NaN and Inf weights out of it.
HIFT_FN float with_l2(float grad, float param, float weight_decay) {
  return weight_decay != 0.0f ? fmaf(weight_decay, param, grad) : grad;
}

}  // namespace hift::HIFT_NS
