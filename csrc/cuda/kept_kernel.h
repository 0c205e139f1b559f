// SPDX-License-Identifier: Apache-2.0
// The kernels for numbers that are not kept as they are computed. How they are kept is read from
// the work at run time, alike for a whole block; numbers are widened and narrowed in registers.
#pragma once

#include <cstdint>
#include <cstring>
#include <utility>

#include "core/precision.h"
#include "core/span.h"
#include "cuda/kernel.h"
#include "cuda/warp.h"
#include "rules/all.h"

namespace hift::cuda {

#if defined(__CUDA_ARCH__)
#define HIFT_UNROLL _Pragma("unroll")
#else
#define HIFT_UNROLL
#endif

// AMSGrad's registers and those of codes allow fewer blocks on an SM than kernel.h asks for; a lane
// that holds eight values of a block of codes has as many bytes in flight.
template <class Rule>
inline constexpr int kValueBlocksPerSm = Rule::states > 2 ? 3 : kBlocksPerSm;
inline constexpr int kCodeBlocksPerSm = 2;

template <class Rule, int kState>
inline constexpr bool is_signed = (non_negative<Rule> >> kState & 1) == 0;

/// One span as these kernels see it.
template <class RuleT>
struct KeptWork {
  using Rule = RuleT;
  using States = std::make_integer_sequence<int, Rule::states>;

  // 16 bytes of a float32 stream, 8 of a 16-bit one: every access of a warp is one unbroken run.
  static constexpr int kWidth = 4;
  // As kernel.h has it; for codes two blocks of them a warp.
  static constexpr std::int64_t kRun = std::int64_t{kThreads} * kWidth * kRounds;

  void* param;
  const void* grad;
  void* state[Rule::states > 0 ? Rule::states : 1];
  float* scale[codes<Rule> ? Rule::states : 1];
  void* master;
  std::int64_t count;
  typename Rule::Hyper hyper;
  float grad_factor;
  std::uint32_t first_block;
  std::uint64_t key;
  std::uint64_t element;  // the parameter's that is the span's first
  DType param_dtype;
  DType grad_dtype;
  StateType state_type;
  Weights weights;
  bool stochastic_state;
  bool has_master;
  bool halved_master;
  bool packed;  // every address is aligned for kWidth values
};

/// N neighbouring values as they lie in memory, two to a word where they have 16 bits. Nothing is
/// done to them before all that a thread needs is on its way.
template <int N>
struct Raw {
  std::uint32_t word[N];
  bool halves;

  /// Value k: a float's bits, or a 16-bit value in the upper half, where a bfloat16 is a float's
  /// bits too.
  HIFT_FN std::uint32_t at(int k) const {
    if (!halves) return word[k];
    return N == 1 || k % 2 == 0 ? word[k / 2] << 16 : word[k / 2] & 0xffff0000u;
  }
};

/// Words whose memory others see as values of another type.
template <class T, int N>
struct [[gnu::may_alias]] alignas(sizeof(T) * N) Words {
  T at[N];
};

template <int N>
HIFT_FN Raw<N> fetch(const void* from, std::int64_t i, bool halves) {
  Raw<N> raw;
  raw.halves = halves;
  if (!halves) {
    const auto* const at = static_cast<const std::uint32_t*>(from) + i;
    const auto words = *reinterpret_cast<const Words<std::uint32_t, N>*>(at);
    for (int k = 0; k < N; ++k) raw.word[k] = words.at[k];
    return raw;
  }
  const auto* const at = static_cast<const std::uint16_t*>(from) + i;
  if constexpr (N == 1) {
    raw.word[0] = reinterpret_cast<const Words<std::uint16_t, 1>*>(at)->at[0];
  } else {
    const auto words = *reinterpret_cast<const Words<std::uint32_t, N / 2>*>(at);
    for (int k = 0; k < N / 2; ++k) raw.word[k] = words.at[k];
  }
  return raw;
}

/// N words by one store, which the compiler would take apart where several branches lead to it.
template <int N>
HIFT_FN void store_words(const std::uint32_t (&word)[N], void* to) {
#if defined(__CUDA_ARCH__)
  if constexpr (N == 4) {
    __stwb(static_cast<uint4*>(to), make_uint4(word[0], word[1], word[2], word[3]));
  } else if constexpr (N == 2) {
    __stwb(static_cast<uint2*>(to), make_uint2(word[0], word[1]));
  } else {
    *static_cast<std::uint32_t*>(to) = word[0];
  }
#else
  memcpy(to, word, sizeof word);
#endif
}

/// The reverse of `fetch` and `at`.
template <int N>
HIFT_FN void put(const std::uint32_t (&value)[N], void* to, std::int64_t i, bool halves) {
  if (!halves) {
    store_words(value, static_cast<std::uint32_t*>(to) + i);
    return;
  }
  auto* const at = static_cast<std::uint16_t*>(to) + i;
  if constexpr (N == 1) {
    const Words<std::uint16_t, 1> word{{static_cast<std::uint16_t>(value[0] >> 16)}};
    *reinterpret_cast<Words<std::uint16_t, 1>*>(at) = word;
  } else {
    std::uint32_t word[N / 2];
    for (int k = 0; k < N; k += 2) word[k / 2] = value[k] >> 16 | (value[k + 1] & 0xffff0000u);
    store_words(word, at);
  }
}

HIFT_FN float widened(std::uint32_t value, DType type) {
  if (type != DType::kFloat16) return float_of(value);
  return load(Float16{static_cast<std::uint16_t>(value >> 16)});
}

HIFT_FN std::uint32_t narrowed(float x, DType type) {
  if (type == DType::kFloat32) return bits_of(x);
  if (type == DType::kBFloat16) return nearest_bits(x) & 0xffff0000u;
  Float16 half;
  store(half, x);
  return std::uint32_t{half.bits} << 16;
}

/// A weight as the rule takes it; `master` is what is kept beside it.
template <class Work>
HIFT_FN float opened(const Work& w, std::uint32_t weight, std::uint32_t master) {
  if (w.weights == Weights::kSplit) return joined(weight, master);
  // A weight that is not its master's rounding was set by somebody else, and is what counts.
  if (w.weights == Weights::kMaster && narrowed(float_of(master), w.param_dtype) == weight)
    return float_of(master);
  return widened(weight, w.param_dtype);
}

/// Two draws for an element: 16 bits each for the weight, and for states 0, 1 and 2.
struct Random {
  std::uint32_t draw[2];

  HIFT_FN std::uint32_t weight() const { return draw[0]; }
  HIFT_FN std::uint32_t state(int s) const {
    return s % 2 == 0 ? draw[(s + 1) / 2] >> 16 : draw[(s + 1) / 2];
  }
};

/// The keys of the elements of a thread block's run, which is too short for a third.
struct Keys {
  std::uint64_t now;
  std::uint64_t next;
  std::uint32_t first;  // the run's first element, without its upper half

  HIFT_FN std::uint64_t of(std::uint32_t element) const { return element < first ? next : now; }
};

template <class Work>
HIFT_FN Keys keys_of(const Work& w, std::int64_t begin) {
  if (!w.stochastic_state && w.weights != Weights::kStochastic) return {};
  const std::uint64_t element = w.element + static_cast<std::uint64_t>(begin);
  return {block_key(w.key, element >> 32), block_key(w.key, (element >> 32) + 1),
          static_cast<std::uint32_t>(element)};
}

/// Those of an element whose number, without its upper half, and key are these; zero where nothing
/// is rounded at random.
template <class Work>
HIFT_FN Random random(const Work& w, std::uint64_t key, std::uint32_t element) {
  Random r{};
  if (!w.stochastic_state && w.weights != Weights::kStochastic) return r;
  r.draw[0] = random_bits(key, 0, element);
  if (Work::Rule::states > 1 && w.stochastic_state) r.draw[1] = random_bits(key, 1, element);
  return r;
}

/// The weight to be kept for `p`, and its master.
template <class Work>
HIFT_FN std::uint32_t closed(const Work& w, float p, const Random& r, std::uint32_t* master) {
  if (w.weights == Weights::kStochastic) return stochastic_bits(p, r.weight()) & 0xffff0000u;
  if (w.weights != Weights::kNearest && w.param_dtype == DType::kBFloat16) p = settled(p);
  const std::uint32_t weight = narrowed(p, w.param_dtype);
  *master = w.weights == Weights::kSplit ? low_bits(p, weight) << 16 : bits_of(p);
  return weight;
}

/// Updates values [i, i + N) in registers: loop and tail are this one function.
template <int N, class Work, int... S>
HIFT_FN void update_values(const Work& w, std::int64_t i, float grad_factor, const Keys& keys,
                           std::integer_sequence<int, S...>) {
  [[maybe_unused]] const bool halves = w.state_type == StateType::kBFloat16;
  const Raw<N> params = fetch<N>(w.param, i, w.param_dtype != DType::kFloat32);
  const Raw<N> grads = fetch<N>(w.grad, i, w.grad_dtype != DType::kFloat32);
  Raw<N> masters{};
  if (w.has_master) masters = fetch<N>(w.master, i, w.halved_master);
  [[maybe_unused]] const Raw<N> states[] = {fetch<N>(w.state[S], i, halves)..., Raw<N>{}};

  std::uint32_t param[N], master[N];
  [[maybe_unused]] std::uint32_t state[sizeof...(S) + 1][N];
  HIFT_UNROLL for (int k = 0; k < N; ++k) {
    float p = opened(w, params.at(k), masters.at(k));
    [[maybe_unused]] float s[] = {float_of(states[S].at(k))..., 0.0f};
    Work::Rule::update(p, widened(grads.at(k), w.grad_dtype) * grad_factor, s[S]..., w.hyper);
    const auto element = static_cast<std::uint32_t>(w.element + static_cast<std::uint64_t>(i + k));
    const Random r = random(w, keys.of(element), element);
    master[k] = 0;
    param[k] = closed(w, p, r, &master[k]);
    if (w.stochastic_state) {
      ((state[S][k] = stochastic_bits(s[S], r.state(S))), ...);
    } else {
      ((state[S][k] = halves ? nearest_bits(s[S]) : bits_of(s[S])), ...);
    }
  }
  put<N>(param, w.param, i, params.halves);
  if (w.has_master) put<N>(master, w.master, i, w.halved_master);
  (put<N>(state[S], w.state[S], i, halves), ...);
}

template <class Table>
__global__ void __launch_bounds__(kThreads, kValueBlocksPerSm<typename Table::Work::Rule>)
    update_kept(const __grid_constant__ Table table) {
  using Work = typename Table::Work;
  constexpr int N = Work::kWidth;
  const Scaling& scaling = table.scaling;
  if (scaling.found_inf != nullptr && *scaling.found_inf != 0.0f) return;

  const Work& w = table.work[find(table, blockIdx.x)];
  float grad_factor = scaling.clip != nullptr ? *scaling.clip : 1.0f;
  if (scaling.grad_scale != nullptr) grad_factor /= *scaling.grad_scale;
  grad_factor *= w.grad_factor;

  const std::int64_t begin = std::int64_t{blockIdx.x - w.first_block} * Work::kRun;
  const std::int64_t end = w.count - begin < Work::kRun ? w.count : begin + Work::kRun;
  const Keys keys = keys_of(w, begin);
  const std::int64_t packed_end = w.packed ? end - (end - begin) % N : begin;
  for (std::int64_t i = begin + std::int64_t{threadIdx.x} * N; i < packed_end; i += kThreads * N) {
    update_values<N>(w, i, grad_factor, keys, typename Work::States());
  }
  for (std::int64_t i = packed_end + threadIdx.x; i < end; i += kThreads) {
    update_values<1>(w, i, grad_factor, keys, typename Work::States());
  }
}

/// Values of a block of codes that a lane holds: those of words `lane` and `lane + 32`.
inline constexpr int kHeld = kBlock / kLanes;

/// The largest of the warp's values, whose codes are then made and stored.
template <int kState, class Work>
HIFT_DEVICE void close_codes(const Work& w, std::int64_t at, int lane, std::uint64_t key,
                             const float (&value)[kHeld]) {
  using Code = Code8<is_signed<typename Work::Rule, kState>>;
  std::uint32_t largest = 0;
  HIFT_UNROLL for (int k = 0; k < kHeld; ++k) {
    const std::uint32_t magnitude = bits_of(value[k]) & 0x7fffffffu;
    largest = magnitude > largest ? magnitude : largest;
  }
  const float scale = scale_of(warp_max(largest));
  const float inverse = shares_per(scale);
  std::uint32_t words[2] = {};
  HIFT_UNROLL for (int k = 0; k < kHeld; ++k) {
    const float share = value[k] * inverse;
    std::uint32_t code = Code::encode(share);
    if (w.stochastic_state) {
      const auto element = static_cast<std::uint32_t>(w.element + at + lane + k * kLanes);
      code = Code::encode_stochastic(share, random(w, key, element).state(kState));
    }
    words[k % 2] |= code << 8 * (k / 2);
  }
  auto* const to =
      reinterpret_cast<Words<std::uint32_t, 1>*>(static_cast<std::uint8_t*>(w.state[kState]) + at);
  for (int half = 0; half < 2; ++half) to[lane + half * kLanes].at[0] = words[half];
  if (lane == 0) w.scale[kState][at / kBlock] = scale;
}

/// A block of codes by a warp: the elements from `at` on, of which the span has `left`. A lane
/// holds every 32nd, so that every access of the warp is one unbroken run.
template <class Work, int... S>
HIFT_DEVICE void update_block(const Work& w, std::int64_t at, std::int64_t left, int lane,
                              float grad_factor, const Keys& keys,
                              std::integer_sequence<int, S...>) {
  using Rule = typename Work::Rule;
  const std::int64_t first = at + lane;
  Raw<1> params[kHeld], grads[kHeld], masters[kHeld];
  HIFT_UNROLL for (int k = 0; k < kHeld; ++k) {
    params[k] = grads[k] = masters[k] = {};
    const std::int64_t i = first + k * kLanes;
    if (lane + k * kLanes >= left) continue;
    params[k] = fetch<1>(w.param, i, w.param_dtype != DType::kFloat32);
    grads[k] = fetch<1>(w.grad, i, w.grad_dtype != DType::kFloat32);
    if (w.has_master) masters[k] = fetch<1>(w.master, i, w.halved_master);
  }
  std::uint32_t words[sizeof...(S)][2];
  float scale[] = {w.scale[S][at / kBlock]...};
  HIFT_UNROLL for (int half = 0; half < 2; ++half) {
    ((words[S][half] = reinterpret_cast<const Words<std::uint32_t, 1>*>(
                           static_cast<const std::uint8_t*>(w.state[S]) + at)[lane + half * kLanes]
                           .at[0]),
     ...);
  }

  // All of a block has the key of its first element, as on the host.
  const std::uint64_t key = keys.of(static_cast<std::uint32_t>(w.element + at));
  float value[sizeof...(S)][kHeld];
  HIFT_UNROLL for (int k = 0; k < kHeld; ++k) {
    ((value[S][k] = 0.0f), ...);  // what is kept behind a parameter's end
    if (lane + k * kLanes >= left) continue;
    const std::int64_t i = first + k * kLanes;
    ((value[S][k] =
          Code8<is_signed<Rule, S>>::decode(words[S][k % 2] >> 8 * (k / 2) & 0xffu) * scale[S]),
     ...);
    float p = opened(w, params[k].at(0), masters[k].at(0));
    Rule::update(p, widened(grads[k].at(0), w.grad_dtype) * grad_factor, value[S][k]..., w.hyper);
    std::uint32_t master[1] = {};
    const Random r = random(w, key, static_cast<std::uint32_t>(w.element + i));
    const std::uint32_t param[1] = {closed(w, p, r, &master[0])};
    put<1>(param, w.param, i, w.param_dtype != DType::kFloat32);
    if (w.has_master) put<1>(master, w.master, i, w.halved_master);
  }
  (close_codes<S>(w, at, lane, key, value[S]), ...);
}

template <class Table>
__global__ void __launch_bounds__(kThreads, kCodeBlocksPerSm)
    update_codes(const __grid_constant__ Table table) {
  using Work = typename Table::Work;
  const Scaling& scaling = table.scaling;
  if (scaling.found_inf != nullptr && *scaling.found_inf != 0.0f) return;

  const Work& w = table.work[find(table, blockIdx.x)];
  float grad_factor = scaling.clip != nullptr ? *scaling.clip : 1.0f;
  if (scaling.grad_scale != nullptr) grad_factor /= *scaling.grad_scale;
  grad_factor *= w.grad_factor;

  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const std::int64_t begin = std::int64_t{blockIdx.x - w.first_block} * Work::kRun;
  const std::int64_t end = w.count - begin < Work::kRun ? w.count : begin + Work::kRun;
  const Keys keys = keys_of(w, begin);
  for (std::int64_t at = begin + threadIdx.x / kLanes * kBlock; at < end;
       at += kThreads / kLanes * kBlock) {
    update_block(w, at, end - at, lane, grad_factor, keys, typename Work::States());
  }
}

}  // namespace hift::cuda
