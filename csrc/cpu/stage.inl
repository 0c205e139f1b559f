// SPDX-License-Identifier: Apache-2.0
// The pass for numbers that are not kept as they are computed: runs of kBlock elements are widened
// into buffers that stay in the first cache, updated there by the same rules, and narrowed again.
// One loop for each way of keeping a number, whatever the rule; memory is still passed once.

#include "core/precision.h"
#include "core/span.h"
#include "cpu/ahead.inl"
#include "cpu/halves.inl"
#include "rules/all.h"

namespace hift::HIFT_NS {

/// One run: elements [at, at + count) of a span, inside one block of the parameter's elements.
struct Run {
  const Span& span;
  std::int64_t at;
  std::int64_t count;
  std::uint64_t key;      // of the random numbers of this run
  std::uint32_t element;  // the parameter's element at `at`, without its upper half

  std::uint32_t random(std::int64_t i, std::uint32_t number) const {
    return random_bits(key, number, element + static_cast<std::uint32_t>(i));
  }
};

template <class T>
void widen(const Run& run, const void* from, float* to) {
  const T* __restrict values = static_cast<const T*>(from) + run.at;
#pragma omp simd
  for (std::int64_t i = 0; i < run.count; ++i) to[i] = load(values[i]);
}

template <class T>
void narrow(const Run& run, const float* from, void* to) {
  T* __restrict values = static_cast<T*>(to) + run.at;
#pragma omp simd
  for (std::int64_t i = 0; i < run.count; ++i) store(values[i], from[i]);
}

template <>
void widen<Float16>(const Run& run, const void* from, float* to) {
  widen_halves(static_cast<const Float16*>(from) + run.at, to, run.count);
}

template <>
void narrow<Float16>(const Run& run, const float* from, void* to) {
  narrow_halves(from, static_cast<Float16*>(to) + run.at, run.count);
}

// Weights -----------------------------------------------------------------------------------------

template <class T>
void widen_master(const Run& run, float* to) {
  const T* __restrict weights = static_cast<const T*>(run.span.param) + run.at;
  const float* __restrict masters = static_cast<const float*>(run.span.master) + run.at;
#pragma omp simd
  for (std::int64_t i = 0; i < run.count; ++i) {
    T rounded;
    store(rounded, masters[i]);
    // A weight that is not its master's rounding was set by somebody else, and is what counts.
    to[i] = rounded.bits == weights[i].bits ? masters[i] : load(weights[i]);
  }
}

template <>
void widen_master<Float16>(const Run& run, float* to) {
  const auto* __restrict weights = static_cast<const Float16*>(run.span.param) + run.at;
  const float* __restrict masters = static_cast<const float*>(run.span.master) + run.at;
  Float16 rounded[kBlock];
  narrow_halves(masters, rounded, run.count);
  widen_halves(weights, to, run.count);
#pragma omp simd
  for (std::int64_t i = 0; i < run.count; ++i) {
    to[i] = rounded[i].bits == weights[i].bits ? masters[i] : to[i];
  }
}

template <class T>
void narrow_master(const Run& run, const float* from) {
  T* __restrict weights = static_cast<T*>(run.span.param) + run.at;
  float* __restrict masters = static_cast<float*>(run.span.master) + run.at;
#pragma omp simd
  for (std::int64_t i = 0; i < run.count; ++i) {
    const float master = settled(from[i]);
    masters[i] = master;
    store(weights[i], master);
  }
}

template <>
void narrow_master<Float16>(const Run& run, const float* from) {
  memcpy(static_cast<float*>(run.span.master) + run.at, from, run.count * sizeof *from);
  narrow<Float16>(run, from, run.span.param);
}

void widen_split(const Run& run, float* to) {
  const auto* __restrict weights = static_cast<const BFloat16*>(run.span.param) + run.at;
  const auto* __restrict low = static_cast<const std::int16_t*>(run.span.master) + run.at;
#pragma omp simd
  for (std::int64_t i = 0; i < run.count; ++i) to[i] = join(weights[i], low[i]);
}

void narrow_split(const Run& run, const float* from) {
  auto* __restrict weights = static_cast<BFloat16*>(run.span.param) + run.at;
  auto* __restrict low = static_cast<std::int16_t*>(run.span.master) + run.at;
#pragma omp simd
  for (std::int64_t i = 0; i < run.count; ++i) {
    const float master = settled(from[i]);
    BFloat16 weight;
    store(weight, master);
    weights[i].bits = weight.bits;
    low[i] = low_of(master, weight);
  }
}

/// Draw 0 is the weight's and state 0's, draw 1 that of the states after: 16 bits each.
template <int kState>
std::uint32_t state_random(const Run& run, std::int64_t i) {
  const std::uint32_t bits = run.random(i, (kState + 1) / 2);
  return kState % 2 == 0 ? bits >> 16 : bits;
}

void narrow_stochastic(const Run& run, const float* from) {
  auto* __restrict weights = static_cast<BFloat16*>(run.span.param) + run.at;
#pragma omp simd
  for (std::int64_t i = 0; i < run.count; ++i) {
    weights[i].bits = static_cast<std::uint16_t>(stochastic_bits(from[i], run.random(i, 0)) >> 16);
  }
}

void widen_weights(const Run& run, float* to) {
  const bool bfloat16 = run.span.param_dtype == DType::kBFloat16;
  if (run.span.weights == Weights::kSplit) return widen_split(run, to);
  if (run.span.weights == Weights::kMaster) {
    return bfloat16 ? widen_master<BFloat16>(run, to) : widen_master<Float16>(run, to);
  }
  return bfloat16 ? widen<BFloat16>(run, run.span.param, to)
                  : widen<Float16>(run, run.span.param, to);
}

void narrow_weights(const Run& run, const float* from) {
  const bool bfloat16 = run.span.param_dtype == DType::kBFloat16;
  if (run.span.weights == Weights::kSplit) return narrow_split(run, from);
  if (run.span.weights == Weights::kStochastic) return narrow_stochastic(run, from);
  if (run.span.weights == Weights::kMaster) {
    return bfloat16 ? narrow_master<BFloat16>(run, from) : narrow_master<Float16>(run, from);
  }
  return bfloat16 ? narrow<BFloat16>(run, from, run.span.param)
                  : narrow<Float16>(run, from, run.span.param);
}

// State -------------------------------------------------------------------------------------------

/// All of a block, whatever the run's length.
template <bool kSigned>
void widen_codes(const Run& run, const void* from, float scale, float* __restrict to) {
  const auto* __restrict words =
      reinterpret_cast<const std::uint32_t*>(static_cast<const std::byte*>(from) + run.at);
  for (int k = 0; k < 4; ++k) {
#pragma omp simd
    for (int w = 0; w < kWords; ++w) {
      to[k * kWords + w] = Code8<kSigned>::decode(words[w] >> 8 * k & 0xffu) * scale;
    }
  }
}

template <int kState, bool kSigned>
void narrow_codes(const Run& run, float* __restrict from, void* to, float* scale) {
  auto* __restrict words = reinterpret_cast<std::uint32_t*>(static_cast<std::byte*>(to) + run.at);
  for (std::int64_t i = run.count; i < kBlock; ++i) from[i] = 0.0f;
  std::uint32_t largest = 0;
#pragma omp simd reduction(max : largest)
  for (int i = 0; i < kBlock; ++i) {
    const std::uint32_t magnitude = bits_of(from[i]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  *scale = scale_of(largest);
  const float inverse = shares_per(*scale);
  using Code = Code8<kSigned>;
  const auto share = [&](int k, int w) { return from[k * kWords + w] * inverse; };
  if (run.span.stochastic_state) {
    const auto code = [&](int k, int w) {
      const int i = k * kWords + w;
      return Code::encode_stochastic(share(k, w), state_random<kState>(run, i)) << 8 * k;
    };
#pragma omp simd
    for (int w = 0; w < kWords; ++w) words[w] = code(0, w) | code(1, w) | code(2, w) | code(3, w);
  } else {
    const auto code = [&](int k, int w) { return Code::encode(share(k, w)) << 8 * k; };
#pragma omp simd
    for (int w = 0; w < kWords; ++w) words[w] = code(0, w) | code(1, w) | code(2, w) | code(3, w);
  }
}

/// Where the rule finds state `kState` of the run: in place, or widened into `buffer`.
template <class Rule, int kState>
float* open_state(const Run& run, float* buffer) {
  const Span& s = run.span;
  if (s.state_type == StateType::kFloat32) return static_cast<float*>(s.state[kState]) + run.at;
  if (s.state_type == StateType::kBFloat16) {
    widen<BFloat16>(run, s.state[kState], buffer);
  } else if constexpr (codes<Rule>) {
    const float scale = s.scale[kState][run.at / kBlock];
    widen_codes<signed_state<Rule>(kState)>(run, s.state[kState], scale, buffer);
  }
  return buffer;
}

template <class Rule, int kState>
void close_state(const Run& run, float* buffer) {
  const Span& s = run.span;
  if (s.state_type == StateType::kBFloat16) {
    if (!s.stochastic_state) return narrow<BFloat16>(run, buffer, s.state[kState]);
    auto* __restrict values = static_cast<BFloat16*>(s.state[kState]) + run.at;
#pragma omp simd
    for (std::int64_t i = 0; i < run.count; ++i) {
      const std::uint32_t bits = stochastic_bits(buffer[i], state_random<kState>(run, i));
      values[i].bits = static_cast<std::uint16_t>(bits >> 16);
    }
  } else if constexpr (codes<Rule>) {
    if (s.state_type == StateType::kCode8) {
      narrow_codes<kState, signed_state<Rule>(kState)>(run, buffer, s.state[kState],
                                                       s.scale[kState] + run.at / kBlock);
    }
  }
}

/// For a stretch of every stream of a span, in the block after the next.
template <class Rule>
HIFT_INLINE void ask_stretch(const Span& s, std::int64_t at) {
  const auto of = [at](const void* stream, std::int64_t size) HIFT_LAMBDA {
    ask(static_cast<const std::byte*>(stream) + at * size, kStretch, size, 2 * kBlock);
  };
  of(s.param, size_of(s.param_dtype));
  of(s.grad, size_of(s.grad_dtype));
  if (s.weights == Weights::kSplit) of(s.master, sizeof(std::int16_t));
  if (s.weights == Weights::kMaster) of(s.master, sizeof(float));
  for (int i = 0; i < Rule::states; ++i) of(s.state[i], size_of(s.state_type));
}

/// As update_range, for every way of keeping numbers; `begin` starts a block where state is codes.
template <class Rule>
void update_staged(const Span& span, std::int64_t begin, std::int64_t end, float grad_factor) {
  typename Rule::Hyper h;
  memcpy(&h, span.hyper, sizeof h);
  alignas(64) float weights[kBlock], grads[kBlock], states[kMaxStates][kBlock];
  for (std::int64_t at = begin; at < end;) {
    const std::int64_t element = span.shard + span.first + at;
    std::int64_t left = kBlock - (span.first + at) % kBlock;
    // A block of codes is not cut where the key changes: all of it has the key of its first
    // element.
    const bool coded = codes<Rule> && span.state_type == StateType::kCode8;
    if (!coded && keyed(element) < left) left = keyed(element);
    const Run run{span, at, left < end - at ? left : end - at,
                  block_key(span.key, static_cast<std::uint64_t>(element) >> 32),
                  static_cast<std::uint32_t>(element)};
    float* __restrict p = weights;
    if (span.param_dtype == DType::kFloat32) {
      p = static_cast<float*>(span.param) + at;
    } else {
      widen_weights(run, weights);
    }
    const float* __restrict g = grads;
    if (span.grad_dtype == DType::kFloat32) {
      g = static_cast<const float*>(span.grad) + at;
    } else if (span.grad_dtype == DType::kBFloat16) {
      widen<BFloat16>(run, span.grad, grads);
    } else {
      widen<Float16>(run, span.grad, grads);
    }
    [[maybe_unused]] float* __restrict s0 = states[0];
    [[maybe_unused]] float* __restrict s1 = states[1];
    [[maybe_unused]] float* __restrict s2 = states[2];
    if constexpr (Rule::states > 0) s0 = open_state<Rule, 0>(run, states[0]);
    if constexpr (Rule::states > 1) s1 = open_state<Rule, 1>(run, states[1]);
    if constexpr (Rule::states > 2) s2 = open_state<Rule, 2>(run, states[2]);
    const auto update = [&](std::int64_t from, std::int64_t to) HIFT_LAMBDA {
#pragma omp simd
      for (std::int64_t i = from; i < to; ++i) {
        apply<Rule>(p[i], g[i] * grad_factor, &s0[i], &s1[i], &s2[i], h);
      }
    };
    const auto ask_ahead = [&](std::int64_t from)
                               HIFT_LAMBDA { ask_stretch<Rule>(span, at + from); };
    in_stretches(0, run.count, ask_ahead, update);
    if (span.param_dtype != DType::kFloat32) narrow_weights(run, weights);
    if constexpr (Rule::states > 0) close_state<Rule, 0>(run, s0);
    if constexpr (Rule::states > 1) close_state<Rule, 1>(run, s1);
    if constexpr (Rule::states > 2) close_state<Rule, 2>(run, s2);
    at += run.count;
  }
}

}  // namespace hift::HIFT_NS
