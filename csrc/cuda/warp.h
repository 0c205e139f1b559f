// SPDX-License-Identifier: Apache-2.0
// Exchanges between the 32 lanes of a warp, all of which must take part. The tests compile this on
// the host, where they stand in for CUDA's shuffles and run the lanes in lockstep.
#pragma once

#include <cmath>

#if defined(__CUDACC__)
#define HIFT_DEVICE __device__ __forceinline__
#else
#define HIFT_DEVICE inline
#endif

namespace hift::cuda {

inline constexpr int kLanes = 32;
inline constexpr unsigned kAllLanes = 0xffffffffu;

/// What the lane `lane ^ mask` has.
template <class T>
HIFT_DEVICE T shuffle_xor(T value, int mask) {
  return __shfl_xor_sync(kAllLanes, value, mask);
}

/// What lane `from` has.
template <class T>
HIFT_DEVICE T shuffle(T value, int from) {
  return __shfl_sync(kAllLanes, value, from);
}

/// The largest of all lanes' values, for every lane; NaNs are passed over.
HIFT_DEVICE float warp_max(float value) {
  for (int mask = kLanes / 2; mask > 0; mask /= 2) value = fmaxf(value, shuffle_xor(value, mask));
  return value;
}

}  // namespace hift::cuda
