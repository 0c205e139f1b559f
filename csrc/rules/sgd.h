// SPDX-License-Identifier: Apache-2.0
// Stochastic gradient descent, plain and with momentum, in torch.optim.SGD's form: dampening,
// Nesterov, and a momentum buffer whose first value is the gradient itself.
#pragma once

#include "rules/rule.h"

namespace hift::HIFT_NS {

struct Sgd {
  static constexpr const char* name = "sgd";
  static constexpr int states = 0;
  struct Hyper {
    float weight_decay;
    float rate;
  };
  HIFT_FN static void update(float& p, float g, const Hyper& h) {
    p = fmaf(-h.rate, with_l2(g, p, h.weight_decay), p);
  }
};

struct Momentum {
  static constexpr const char* name = "momentum";
  static constexpr int states = 1;
  static constexpr int non_negative = 0;
  struct Hyper {
    float weight_decay;
    float rate;
    float momentum;
    float one_minus_dampening;
    float nesterov;  // 0 or 1
    float first;     // 1 on the first visit: the buffer is the gradient
  };
  HIFT_FN static void update(float& p, float g, float& buffer, const Hyper& h) {
    g = with_l2(g, p, h.weight_decay);
    buffer = h.first != 0.0f ? g : fmaf(h.one_minus_dampening, g, h.momentum * buffer);
    p = fmaf(-h.rate, h.nesterov != 0.0f ? fmaf(h.momentum, buffer, g) : buffer, p);
  }
};

}  // namespace hift::HIFT_NS
