// SPDX-License-Identifier: Apache-2.0
// Runs of binary16 as floats and back, eight at a time where the instruction set has an instruction
// for it. What it gives are the bits of core/dtype.h; a test compares them for every number.

#include "core/dtype.h"

namespace hift::HIFT_NS {

#if defined(HIFT_F16C)  // GCC defines __F16C__ for an option, not for a pragma

HIFT_INLINE void widen_eight(const Float16* from, float* to) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from));
  _mm256_storeu_ps(to, _mm256_cvtph_ps(bits));
}

/// The instruction keeps what fits of a NaN's payload; ours is always torch's.
HIFT_INLINE void narrow_eight(const float* from, Float16* to) {
  const __m256 x = _mm256_loadu_ps(from);
  const __m128i bits = _mm256_cvtps_ph(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m256i nan = _mm256_castps_si256(_mm256_cmp_ps(x, x, _CMP_UNORD_Q));
  const __m128i lost =
      _mm_packs_epi32(_mm256_castsi256_si128(nan), _mm256_extracti128_si256(nan, 1));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(to),
                   _mm_blendv_epi8(bits, _mm_set1_epi16(0x7e00), lost));
}

inline void widen_halves(const Float16* __restrict from, float* __restrict to, std::int64_t count) {
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) widen_eight(from + i, to + i);
  for (; i < count; ++i) to[i] = load(from[i]);
}

inline void narrow_halves(const float* __restrict from, Float16* __restrict to,
                          std::int64_t count) {
  std::int64_t i = 0;
  for (; i + 8 <= count; i += 8) narrow_eight(from + i, to + i);
  for (; i < count; ++i) store(to[i], from[i]);
}

#else

inline void widen_halves(const Float16* __restrict from, float* __restrict to, std::int64_t count) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) to[i] = load(from[i]);
}

inline void narrow_halves(const float* __restrict from, Float16* __restrict to,
                          std::int64_t count) {
#pragma omp simd
  for (std::int64_t i = 0; i < count; ++i) store(to[i], from[i]);
}

#endif

}  // namespace hift::HIFT_NS
