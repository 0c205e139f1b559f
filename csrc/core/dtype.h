// SPDX-License-Identifier: Apache-2.0
// 16-bit floats as bit patterns, with conversions in plain integer and float arithmetic: the same
// bits on every instruction set, and simple enough to vectorise. A GPU's own conversions of
// binary16 give those bits too. Rounding is to nearest, ties to even; every NaN becomes the one
// that torch stores.
#pragma once

#include <cstdint>
#include <cstring>

#ifndef HIFT_NS
#define HIFT_NS generic
#endif

#if defined(__CUDACC__)
#define HIFT_INLINE __host__ __device__ __forceinline__
// Of libdevice, which nvcc links. cuda_fp16.h has the same instructions as inline assembly, across
// which the compiler joins no accesses.
extern "C" __device__ float __nv_half2float(short);
extern "C" __device__ short __nv_float2half_rn(float);
#else
#define HIFT_INLINE inline __attribute__((always_inline))
#endif

namespace hift::HIFT_NS {

HIFT_INLINE std::uint32_t bits_of(float x) {
  std::uint32_t bits;
  memcpy(&bits, &x, sizeof bits);
  return bits;
}

HIFT_INLINE float float_of(std::uint32_t bits) {
  float x;
  memcpy(&x, &bits, sizeof x);
  return x;
}

/// The upper half of a float (bfloat16).
struct BFloat16 {
  std::uint16_t bits;
};

/// IEEE 754 binary16.
struct Float16 {
  std::uint16_t bits;
};

HIFT_INLINE float load(float x) { return x; }

HIFT_INLINE float load(BFloat16 x) { return float_of(std::uint32_t{x.bits} << 16); }

HIFT_INLINE float load(Float16 x) {
#if defined(__CUDA_ARCH__)
  // Exact. A NaN may lose its payload, as it does in a GPU's next operation anyway.
  return __nv_half2float(static_cast<short>(x.bits));
#else
  const std::uint32_t sign = (x.bits & 0x8000u) << 16;
  const std::uint32_t magnitude = x.bits & 0x7fffu;
  // Exponent and mantissa moved into place, then the bias 15 -> 127. Inf and NaN get float's own
  // exponent. No operand is a subnormal float, so flushing those to zero changes nothing.
  const std::uint32_t normal = (magnitude << 13) + 0x38000000u;
  // Beside 2^-14 the mantissa is on half's subnormal grid; without it it is the number.
  const float least = float_of(0x38800000u);
  const std::uint32_t subnormal = bits_of(float_of((magnitude << 13) + 0x38800000u) - least);
  const std::uint32_t finite = magnitude < 0x400u ? subnormal : normal;
  return float_of((magnitude >= 0x7c00u ? normal | 0x7f800000u : finite) | sign);
#endif
}

HIFT_INLINE void store(float& to, float x) { to = x; }

HIFT_INLINE void store(BFloat16& to, float x) {
  const std::uint32_t bits = bits_of(x);
  const std::uint32_t rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  to.bits = static_cast<std::uint16_t>((x == x ? rounded : 0x7fc00000u) >> 16);
}

HIFT_INLINE void store(Float16& to, float x) {
#if defined(__CUDA_ARCH__)
  // Beyond the largest number it gives infinity, below the least normal one subnormals, and for NaN
  // 0x7fff.
  const auto number = static_cast<std::uint16_t>(__nv_float2half_rn(x));
  to.bits = x == x ? number : std::uint16_t{0x7e00};
#else
  const std::uint32_t sign = (bits_of(x) & 0x80000000u) >> 16;
  const std::uint32_t magnitude = bits_of(x) & 0x7fffffffu;
  // Normal range: rebias and round the 13 dropped bits. A carry out of the mantissa is the next
  // exponent, as it should be.
  const std::uint32_t normal = (magnitude + 0xc8000fffu + ((magnitude >> 13) & 1u)) >> 13;
  // Below 2^-14: adding 0.5 aligns the mantissa with half's subnormal grid, and the addition itself
  // rounds.
  const std::uint32_t subnormal = bits_of(float_of(magnitude) + 0.5f) - 0x3f000000u;
  const std::uint32_t finite = magnitude < 0x38800000u ? subnormal : normal;
  const std::uint32_t number = (magnitude >= 0x47800000u ? 0x7c00u : finite) | sign;
  to.bits = static_cast<std::uint16_t>(x == x ? number : 0x7e00u);
#endif
}

}  // namespace hift::HIFT_NS
