// SPDX-License-Identifier: Apache-2.0
// The loops compiled for AVX2 and FMA, eight floats at a time.
// The standard headers come first: nothing of theirs may be compiled for this target and then kept
// for everyone.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#pragma GCC target("avx2,fma,f16c")

#define HIFT_NS avx2
#define HIFT_F16C
#include "cpu/loop.inl"
#include "cpu/norm.inl"
