// SPDX-License-Identifier: Apache-2.0
// The pass where every number is kept in 16 bits: a word holds two neighbours, whose bits are taken
// apart where they stand. Nothing moves between lanes, which is what conversions spend most on.

#include "core/precision.h"
#include "core/span.h"
#include "cpu/ahead.inl"
#include "rules/all.h"

namespace hift::HIFT_NS {

using Word [[gnu::aligned(2), gnu::may_alias]] = std::uint32_t;

/// The floats whose upper halves are a word's two bfloat16.
HIFT_INLINE float first_of(std::uint32_t word) { return float_of(word << 16); }
HIFT_INLINE float second_of(std::uint32_t word) { return float_of(word & 0xffff0000u); }

HIFT_INLINE std::uint32_t put_together(std::uint32_t first, std::uint32_t second) {
  return first >> 16 | (second & 0xffff0000u);
}

template <bool kStochastic>
HIFT_INLINE std::uint32_t kept(float first, float second, std::uint32_t random0,
                               std::uint32_t random1) {
  if constexpr (kStochastic) {
    return put_together(stochastic_bits(first, random0), stochastic_bits(second, random1));
  } else {
    return put_together(nearest_bits(first), nearest_bits(second));
  }
}

/// `words` words of a span whose weights, gradients and state are all bfloat16, behind the
/// `skipped` elements; they may begin at any address.
template <class Rule, bool kStochastic>
void update_words(const Span& span, std::int64_t skipped, std::int64_t words, std::uint64_t key,
                  float grad_factor) {
  typename Rule::Hyper h;
  memcpy(&h, span.hyper, sizeof h);
  const auto word_of = [&](const void* values) {
    return reinterpret_cast<const Word*>(static_cast<const BFloat16*>(values) + skipped);
  };
  Word* __restrict param = const_cast<Word*>(word_of(span.param));
  const Word* __restrict grad = word_of(span.grad);
  [[maybe_unused]] Word* __restrict state0 = const_cast<Word*>(word_of(span.state[0]));
  [[maybe_unused]] Word* __restrict state1 = const_cast<Word*>(word_of(span.state[1]));
  [[maybe_unused]] Word* __restrict state2 = const_cast<Word*>(word_of(span.state[2]));
  [[maybe_unused]] const auto element =
      static_cast<std::uint32_t>(span.shard + span.first + skipped);
  const auto ask_ahead = [&](std::int64_t at) HIFT_LAMBDA {
    ask_stretch<Rule::states>(at, param, grad, state0, state1, state2);
  };
  const auto update = [&](std::int64_t from, std::int64_t to) HIFT_LAMBDA {
#pragma omp simd
    for (std::int64_t i = from; i < to; ++i) {
      float p0 = first_of(param[i]), p1 = second_of(param[i]);
      float a0 = 0, a1 = 0, b0 = 0, b1 = 0, c0 = 0, c1 = 0;
      if constexpr (Rule::states > 0) a0 = first_of(state0[i]), a1 = second_of(state0[i]);
      if constexpr (Rule::states > 1) b0 = first_of(state1[i]), b1 = second_of(state1[i]);
      if constexpr (Rule::states > 2) c0 = first_of(state2[i]), c1 = second_of(state2[i]);
      apply<Rule>(p0, first_of(grad[i]) * grad_factor, &a0, &b0, &c0, h);
      apply<Rule>(p1, second_of(grad[i]) * grad_factor, &a1, &b1, &c1, h);

      std::uint32_t x0 = 0, x1 = 0, y0 = 0, y1 = 0;  // random
      if constexpr (kStochastic) {
        const std::uint32_t at = element + 2 * static_cast<std::uint32_t>(i);
        x0 = random_bits(key, 0, at), x1 = random_bits(key, 0, at + 1);
        if constexpr (Rule::states > 1)
          y0 = random_bits(key, 1, at), y1 = random_bits(key, 1, at + 1);
      }
      param[i] = kept<kStochastic>(p0, p1, x0, x1);
      if constexpr (Rule::states > 0) state0[i] = kept<kStochastic>(a0, a1, x0 >> 16, x1 >> 16);
      if constexpr (Rule::states > 1) state1[i] = kept<kStochastic>(b0, b1, y0, y1);
      if constexpr (Rule::states > 2) state2[i] = kept<kStochastic>(c0, c1, y0 >> 16, y1 >> 16);
    }
  };
  in_stretches(0, words, ask_ahead, update);
}

/// As update_range. Runs end where the key of the random numbers changes.
template <class Rule, bool kStochastic>
void update_pairs(const Span& span, std::int64_t begin, std::int64_t end, float grad_factor) {
  while (begin < end) {
    const std::int64_t element = span.shard + span.first + begin, left = keyed(element);
    const std::int64_t run = left < end - begin ? left : end - begin;
    const auto block = static_cast<std::uint64_t>(element) >> 32;
    const std::int64_t even = run / 2 * 2;
    update_words<Rule, kStochastic>(span, begin, run / 2, block_key(span.key, block), grad_factor);
    if (even < run) update_staged<Rule>(span, begin + even, begin + run, grad_factor);
    begin += run;
  }
}

}  // namespace hift::HIFT_NS
