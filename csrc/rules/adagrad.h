// SPDX-License-Identifier: Apache-2.0
// Adagrad (Duchi et al., JMLR 12, 2011): every element's rate falls with the sum of its squared
// gradients.
#pragma once

#include "rules/rule.h"

namespace hift::HIFT_NS {

struct Adagrad {
  static constexpr const char* name = "adagrad";
  static constexpr int states = 1;
  struct Hyper {
    float weight_decay;
    float rate;  // lr / (1 + (t - 1) * lr_decay)
    float eps;
  };
  HIFT_FN static void update(float& p, float g, float& sum, const Hyper& h) {
    g = with_l2(g, p, h.weight_decay);
    sum = fmaf(g, g, sum);
    p -= h.rate * g / (sqrtf(sum) + h.eps);
  }
};

}  // namespace hift::HIFT_NS
