// SPDX-License-Identifier: Apache-2.0
// The words every layer shares: how numbers are kept, a span of elements to update, and the scalars
// that scale a step. A span is data: addresses, a count, its rule and its hyper-parameters. It owns
// nothing.
#pragma once

#include <cstdint>

namespace hift {

enum class DType : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

constexpr std::int64_t size_of(DType t) { return t == DType::kFloat32 ? 4 : 2; }

/// How a rule's state is kept: as it is computed, in half the bits, or as 8-bit codes with a scale
/// for each run of 256 elements (core/precision.h).
enum class StateType : std::int32_t { kFloat32 = 0, kBFloat16 = 1, kCode8 = 2 };
inline constexpr int kStateTypes = 3;

constexpr std::int64_t size_of(StateType t) {
  return t == StateType::kFloat32 ? 4 : t == StateType::kBFloat16 ? 2 : 1;
}

/// How a 16-bit weight is kept: rounded to nearest, rounded at random, or beside a master, which is
/// a float32 or the low half of one. A float32 weight is its own master.
enum class Weights : std::int32_t { kNearest = 0, kStochastic = 1, kMaster = 2, kSplit = 3 };

constexpr std::int64_t master_size(Weights w) {
  return w == Weights::kMaster ? 4 : w == Weights::kSplit ? 2 : 0;
}

inline constexpr int kMaxStates = 3;  // exp_avg, exp_avg_sq, max_exp_avg_sq
inline constexpr int kMaxHyper =
    8;  // floats; the largest Rule::Hyper fits (checked where rules are listed)

/// `count` contiguous elements of one parameter, with what one rule needs to update them.
///
/// `param`, `state`, `scale` and `master` are changed in place; `grad` is only read. Addresses are
/// aligned to their element type, no more.
struct Span {
  void* param = nullptr;
  const void* grad = nullptr;
  void* state[kMaxStates] = {};   // values of `state_type`
  float* scale[kMaxStates] = {};  // of codes: one for every 256 elements, from the span's first on
  void* master = nullptr;         // float or int16, as `weights` says
  std::int64_t count = 0;
  float hyper[kMaxHyper] = {};  // a Rule::Hyper, float by float
  float grad_factor = 1.0f;     // -1 to maximize
  std::int32_t rule = 0;        // index into HIFT_RULES
  DType param_dtype = DType::kFloat32;
  DType grad_dtype = DType::kFloat32;
  StateType state_type = StateType::kFloat32;
  Weights weights = Weights::kNearest;
  bool stochastic_state = false;  // values of less than 32 bits are rounded at random
  std::uint64_t key = 0;          // of the random numbers: seed, parameter and visit
  std::int64_t first = 0;  // the item's element that is the span's first; for codes a multiple of
                           // 256
  std::int64_t shard = 0;  // elements of the parameter before the item's: random numbers do not
                           // depend on how it is sharded
};

/// Scalars that enter the pass by address, so that on a GPU nobody waits for their value. Null
/// means absent.
struct Scaling {
  const float* grad_scale = nullptr;  // gradients are divided by it (torch.amp.GradScaler)
  const float* clip = nullptr;        // gradients are multiplied by it
  const float* found_inf = nullptr;   // non-zero: the whole step changes nothing
};

}  // namespace hift
