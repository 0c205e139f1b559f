// SPDX-License-Identifier: Apache-2.0
// A block at a time, with the functions of the pass itself.
#include "cpu/codes.h"

#include <algorithm>

#include "core/precision.h"

namespace hift::cpu {
namespace {

using namespace generic;

/// Where the code of element `i` is: see core/precision.h.
std::int64_t place(std::int64_t i) {
  const std::int64_t within = i % kBlock;
  return i - within + 4 * (within % kWords) + within / kWords;
}

template <bool kSigned>
void decode_blocks(const std::uint8_t* codes, const float* scales, std::int64_t count, float* to) {
  for (std::int64_t i = 0; i < count; ++i) {
    to[i] = Code8<kSigned>::decode(codes[place(i)]) * scales[i / kBlock];
  }
}

template <bool kSigned>
void encode_blocks(const float* from, std::int64_t count, std::uint8_t* codes, float* scales) {
  for (std::int64_t begin = 0; begin < count; begin += kBlock) {
    const std::int64_t end = std::min<std::int64_t>(begin + kBlock, count);
    std::uint32_t largest = 0;
    for (std::int64_t i = begin; i < end; ++i) {
      largest = std::max(largest, bits_of(from[i]) & 0x7fffffffu);
    }
    const float scale = scales[begin / kBlock] = scale_of(largest);
    const float inverse = shares_per(scale);
    for (std::int64_t i = begin; i < end; ++i) {
      codes[place(i)] = static_cast<std::uint8_t>(Code8<kSigned>::encode(from[i] * inverse));
    }
  }
}

}  // namespace

void decode(const std::uint8_t* codes, const float* scales, std::int64_t count, bool is_signed,
            float* to) {
  (is_signed ? decode_blocks<true> : decode_blocks<false>)(codes, scales, count, to);
}

void encode(const float* from, std::int64_t count, bool is_signed, std::uint8_t* codes,
            float* scales) {
  (is_signed ? encode_blocks<true> : encode_blocks<false>)(from, count, codes, scales);
}

}  // namespace hift::cpu
