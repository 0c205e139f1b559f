// SPDX-License-Identifier: Apache-2.0
// The loops compiled for AVX-512, sixteen floats at a time.
// The standard headers come first: nothing of theirs may be compiled for this target and then kept
// for everyone.
#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>

#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c,prefer-vector-width=512")

#define HIFT_NS avx512
#define HIFT_F16C
#include "cpu/loop.inl"
#include "cpu/norm.inl"
