// SPDX-License-Identifier: Apache-2.0
// The loops compiled for the compiler's own target: SSE2 on x86-64, whatever is standard elsewhere.
// The standard headers come first: nothing of theirs may be compiled for this target and then kept
// for everyone.
#include <cmath>
#include <cstdint>
#include <cstring>

#define HIFT_NS baseline
#include "cpu/loop.inl"
#include "cpu/norm.inl"
