// SPDX-License-Identifier: Apache-2.0
// Whether the ways a span's numbers are kept fit together: the one place that says what is offered,
// for every backend.
#pragma once

#include <cstdint>

#include "core/check.h"
#include "core/precision.h"
#include "core/span.h"

namespace hift {

/// Throws std::invalid_argument for a span whose numbers cannot be kept as it says, or that lacks
/// an address. `states` and `non_negative` are the rule's.
inline void check_kept(const Span& s, const char* rule, int states, int non_negative) {
  const auto type = static_cast<int>(s.state_type), weights = static_cast<int>(s.weights);
  check_argument(type >= 0 && type < kStateTypes, "state type ", type, " is not one of ",
                 kStateTypes);
  check_argument(s.state_type != StateType::kCode8 || states == 0 || non_negative >= 0,
                 "state of rule ", rule, " is not kept as 8-bit codes");
  check_argument(s.state_type != StateType::kCode8 || s.first % generic::kBlock == 0,
                 "a span of 8-bit state begins at element ", s.first,
                 ", which is not a multiple of ", generic::kBlock);
  check_argument(
      weights >= 0 && weights <= static_cast<int>(Weights::kSplit), "way ", weights,
      " of keeping weights is not one of 0 (nearest), 1 (stochastic), 2 (master), 3 (split)");
  const bool fits = s.weights == Weights::kNearest ||
                    (s.weights == Weights::kMaster && s.param_dtype != DType::kFloat32) ||
                    s.param_dtype == DType::kBFloat16;
  check_argument(fits, "parameters of type ", static_cast<int>(s.param_dtype),
                 " are not kept in way ", weights,
                 ": stochastic rounding and split masters are for bfloat16, whole masters for "
                 "bfloat16 and float16");
  bool present = s.param != nullptr && s.grad != nullptr;
  for (int i = 0; i < states; ++i) {
    present = present && s.state[i] != nullptr &&
              (s.state_type != StateType::kCode8 || s.scale[i] != nullptr);
  }
  present = present && (master_size(s.weights) == 0 || s.master != nullptr);
  for (int i = 0; i < states && s.state_type == StateType::kCode8; ++i) {
    check_argument(reinterpret_cast<std::uintptr_t>(s.state[i]) % sizeof(std::uint32_t) == 0,
                   "codes at ", s.state[i], " do not begin at a word of 4 bytes");
  }
  check_argument(present || s.count == 0, "a span of ", s.count, " elements for rule ", rule,
                 " has a null address");
}

}  // namespace hift
