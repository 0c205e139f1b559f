// SPDX-License-Identifier: Apache-2.0
// Numbers kept in fewer bits than they are computed in: masters split in halves, stochastic
// rounding, 8-bit codes. Integer and float arithmetic only, so that every backend has the same
// bits.
#pragma once

#include <cstdint>

#include "core/dtype.h"

namespace hift::HIFT_NS {

// Masters of bfloat16 weights ---------------------------------------------------------------------

/// A float32 master as its weight and what the weight lacks: (weight << 16) + low is the master's
/// bits. Of the 65,537 floats that round to an even weight, the one halfway above it has no such
/// remainder: it is taken one bit lower. A whole master gives up the same bit (`settled`), so both
/// kinds of master are the same numbers.
HIFT_INLINE float settled(float master) {
  const std::uint32_t bits = bits_of(master);
  return float_of(bits - ((bits & 0x1ffffu) == 0x8000u ? 1u : 0u));
}

/// The bits of a weight and of its low half, each in the upper 16, as a master.
HIFT_INLINE float joined(std::uint32_t weight, std::uint32_t low) {
  return float_of(weight + static_cast<std::uint32_t>(static_cast<std::int32_t>(low) >> 16));
}

/// What the rounded `master`, in the upper 16 bits of `weight`, lacks. NaN, whose weight is
/// torch's, lacks nothing.
HIFT_INLINE std::uint32_t low_bits(float master, std::uint32_t weight) {
  return master == master ? bits_of(master) - (weight & 0xffff0000u) : 0u;
}

HIFT_INLINE float join(BFloat16 weight, std::int16_t low) {
  return joined(std::uint32_t{weight.bits} << 16, static_cast<std::uint32_t>(low) << 16);
}

HIFT_INLINE std::int16_t low_of(float master, BFloat16 weight) {
  return static_cast<std::int16_t>(low_bits(master, std::uint32_t{weight.bits} << 16));
}

/// `x` rounded to nearest as a bfloat16, in the upper 16 bits; the lower ones are of no meaning.
HIFT_INLINE std::uint32_t nearest_bits(float x) {
  const std::uint32_t bits = bits_of(x);
  return x == x ? bits + 0x7fffu + ((bits >> 16) & 1u) : 0x7fc00000u;
}

// Stochastic rounding -----------------------------------------------------------------------------

/// 32 random bits for an element of a parameter, from a counter: `key` is made of the seed, the
/// parameter and the visit, `number` tells several draws for one element apart. Two rounds of
/// xor-shift and multiply, keyed before each.
HIFT_INLINE std::uint32_t random_bits(std::uint64_t key, std::uint32_t number,
                                      std::uint32_t element) {
  std::uint32_t x = element ^ static_cast<std::uint32_t>(key);
  x = (x ^ (x >> 16)) * 0x7feb352du;
  x ^= static_cast<std::uint32_t>(key >> 32) + number * 0x9e3779b9u;
  x = (x ^ (x >> 15)) * 0x846ca68bu;
  return x ^ (x >> 16);
}

/// Spreads 64 bits (Steele, Lea & Flood, SplitMix64's output function).
HIFT_INLINE std::uint64_t spread(std::uint64_t x) {
  x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
  x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
  return x ^ (x >> 31);
}

/// The key of a parameter's visit. Elements from 2^32 on have keys of their own (`block`: element
/// >> 32).
HIFT_INLINE std::uint64_t visit_key(std::uint64_t seed, std::uint64_t param, std::uint64_t visit) {
  return spread(spread(spread(seed + 0x9e3779b97f4a7c15u) + param) + visit);
}
HIFT_INLINE std::uint64_t block_key(std::uint64_t key, std::uint64_t block) {
  return block == 0 ? key : spread(key + block);
}

/// Elements from `element` on that have its key.
HIFT_INLINE std::int64_t keyed(std::int64_t element) {
  constexpr std::int64_t kEach = std::int64_t{1} << 32;
  return kEach - element % kEach;
}

/// `x` as a bfloat16 in the upper 16 bits, rounded up with the probability of the part that is
/// dropped; `random` gives 16 bits. Infinity and NaN stay what they are.
HIFT_INLINE std::uint32_t stochastic_bits(float x, std::uint32_t random) {
  return x == x ? bits_of(x) + (random & 0xffffu) : 0x7fc00000u;
}

// 8-bit codes -------------------------------------------------------------------------------------
//
// A block of kBlock elements has a scale, its largest magnitude, and a code for each element's
// share of it: a float of 3 mantissa bits, with 4 exponent bits and a sign, or with 5 exponent bits
// for what is never below zero. There are no subnormal codes: the code of the smallest share stands
// for zero. The code of 1 is the largest used. Word w of a block's 64 holds the codes of elements
// w, w + 64, w + 128 and w + 192, the first in its lowest byte: so no backend moves numbers between
// lanes to pack them. A block at a parameter's end is whole, its rest zero.

inline constexpr int kBlock = 256;
inline constexpr int kWords = kBlock / 4;

/// Magnitudes below this are kept as zero, so that no code times its scale is subnormal.
inline constexpr float kLeastScale = 0x1p-90f;

template <bool kSigned>
struct Code8 {
  static constexpr int kExponents = kSigned ? 15 : 31;  // the code of 1 is kExponents << 3
  static constexpr std::uint32_t kBias = std::uint32_t{127 - kExponents} << 23;

  /// A code's share of its scale; exact.
  HIFT_INLINE static float decode(std::uint32_t code) {
    const std::uint32_t magnitude = kSigned ? code & 0x7fu : code;
    const std::uint32_t share = magnitude != 0 ? (magnitude << 20) + kBias : 0u;
    return float_of(kSigned ? share | (code & 0x80u) << 24 : share);
  }

  /// The code nearest to `share`; halfway is away from zero, and what is above 1 is 1.
  HIFT_INLINE static std::uint32_t encode(float share) { return encode(share, 0x80000u); }

  /// One of the two codes around `share`, the nearer one more often: in the mean it is `share`.
  HIFT_INLINE static std::uint32_t encode_stochastic(float share, std::uint32_t random) {
    return encode(share, (random & 0xffffu) << 4);
  }

 private:
  HIFT_INLINE static std::uint32_t encode(float share, std::uint32_t added) {
    const std::uint32_t bits = bits_of(share);
    const auto magnitude = static_cast<std::int32_t>(bits & 0x7fffffffu);
    const std::int32_t most = magnitude < 0x3f800000 ? magnitude : 0x3f800000;
    const std::int32_t above = most + static_cast<std::int32_t>(added - kBias);
    const auto code = static_cast<std::uint32_t>(above > 0 ? above : 0) >> 20;
    return kSigned ? code | (bits >> 24 & 0x80u) : code;
  }
};

/// The scale to be kept for a block whose magnitudes have `largest` as their greatest bit pattern
/// (so that NaN and infinity spoil the scale, and with it the block).
HIFT_INLINE float scale_of(std::uint32_t largest) {
  const float scale = float_of(largest);
  return scale < kLeastScale ? 0.0f : scale;
}

/// What magnitudes are multiplied by to become shares; the scale's own share is at least 1.
HIFT_INLINE float shares_per(float scale) {
  if (scale == 0.0f) return 0.0f;
  const float inverse = 1.0f / scale;
  return scale * inverse < 1.0f ? float_of(bits_of(inverse) + 1) : inverse;
}

}  // namespace hift::HIFT_NS
