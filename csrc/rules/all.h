// SPDX-License-Identifier: Apache-2.0
// The list of rules. A rule's place in it is the number a span carries; a new rule adds its header
// and one line here.
#pragma once

#include "rules/adagrad.h"
#include "rules/adamw.h"
#include "rules/sgd.h"

#define HIFT_RULES(X)   \
  X(AdamRule<true>)     \
  X(AmsgradRule<true>)  \
  X(AdamRule<false>)    \
  X(AmsgradRule<false>) \
  X(Adagrad)            \
  X(Sgd)                \
  X(Momentum)

namespace hift::HIFT_NS {

#define HIFT_COUNT(...) +1
inline constexpr int kRules = 0 HIFT_RULES(HIFT_COUNT);
#undef HIFT_COUNT

}  // namespace hift::HIFT_NS
