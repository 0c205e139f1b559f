// SPDX-License-Identifier: Apache-2.0
// Adam (Kingma & Ba, arXiv 1412.6980) and AdamW (Loshchilov & Hutter, arXiv 1711.05101), with and
// without AMSGrad (Reddi et al., arXiv 1904.09237). eps stands outside the root; bias corrections
// are folded on the host, in double.
#pragma once

#include "rules/rule.h"

namespace hift::HIFT_NS {

/// Decoupled: the weight shrinks by `decay` = 1 - lr * weight_decay. Otherwise `decay` is the L2
/// coefficient.
struct AdamHyper {
  float decay;
  float one_minus_beta1;
  float beta2;
  float one_minus_beta2;
  float step_size;     // lr / (1 - beta1^t)
  float inv_bc2_sqrt;  // 1 / sqrt(1 - beta2^t)
  float eps;
};

template <bool kDecoupled>
HIFT_FN float adam_moments(float& p, float g, float& exp_avg, float& exp_avg_sq,
                           const AdamHyper& h) {
  if constexpr (kDecoupled) {
    p *= h.decay;
  } else {
    g = with_l2(g, p, h.decay);
  }
  exp_avg = lerp(exp_avg, g, h.one_minus_beta1);
  exp_avg_sq = fmaf(h.one_minus_beta2 * g, g, h.beta2 * exp_avg_sq);
  return exp_avg_sq;
}

HIFT_FN void adam_apply(float& p, float exp_avg, float second_moment, const AdamHyper& h) {
  const float denominator = fmaf(sqrtf(second_moment), h.inv_bc2_sqrt, h.eps);
  p -= h.step_size * exp_avg / denominator;
}

template <bool kDecoupled>
struct AdamRule {
  static constexpr const char* name = kDecoupled ? "adamw" : "adam";
  static constexpr int states = 2;
  static constexpr int non_negative = 0b10;
  using Hyper = AdamHyper;
  HIFT_FN static void update(float& p, float g, float& exp_avg, float& exp_avg_sq, const Hyper& h) {
    adam_apply(p, exp_avg, adam_moments<kDecoupled>(p, g, exp_avg, exp_avg_sq, h), h);
  }
};

template <bool kDecoupled>
struct AmsgradRule {
  static constexpr const char* name = kDecoupled ? "adamw_amsgrad" : "adam_amsgrad";
  static constexpr int states = 3;
  static constexpr int non_negative = 0b110;
  using Hyper = AdamHyper;
  HIFT_FN static void update(float& p, float g, float& exp_avg, float& exp_avg_sq,
                             float& max_exp_avg_sq, const Hyper& h) {
    const float v = adam_moments<kDecoupled>(p, g, exp_avg, exp_avg_sq, h);
    max_exp_avg_sq = max_exp_avg_sq > v ? max_exp_avg_sq : v;
    adam_apply(p, exp_avg, max_exp_avg_sq, h);
  }
};

}  // namespace hift::HIFT_NS
