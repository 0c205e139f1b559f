// SPDX-License-Identifier: Apache-2.0
// The words every layer shares: element types, a span of elements to update, and the scalars that
// scale a step. A span is data: addresses, a count, its rule and its hyper-parameters. It owns
// nothing.
#pragma once

#include <cstdint>

namespace hift {

enum class DType : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr std::int64_t size_of(DType t) { return t == DType::kFloat32 ? 4 : 2; }

inline constexpr int kMaxStates = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq
inline constexpr int kMaxHyper =
    8;  // floats; the largest Rule::Hyper fits (checked where rules are listed)

/// `count` contiguous elements of one parameter, with what one rule needs to update them.
///
/// `param` and `state` are changed in place; `grad` is only read. Addresses are aligned to their
/// element type, no more.
struct Span {
  void* param = nullptr;
  const void* grad = nullptr;
  float* state[kMaxStates] = {};
  std::int64_t count = 0;
  float hyper[kMaxHyper] = {};  // a Rule::Hyper, float by float
  float grad_factor = 1.0f;     // -1 to maximize
  std::int32_t rule = 0;        // index into HIFT_RULES
  DType param_dtype = DType::kFloat32;
  DType grad_dtype = DType::kFloat32;
};

/// Scalars that enter the pass by address, so that on a GPU nobody waits for their value. Null
/// means absent.
struct Scaling {
  const float* grad_scale = nullptr;  // gradients are divided by it (torch.amp.GradScaler)
  const float* clip = nullptr;        // gradients are multiplied by it
  const float* found_inf = nullptr;   // non-zero: the whole step changes nothing
};

}  // namespace hift
