// SPDX-License-Identifier: Apache-2.0
// The norm of a group's gradients, as every backend adds it up. The order of the additions is a
// contract, since the bits depend on it: threads, instruction sets and GPUs must agree.
//
// A gradient is cut into blocks of 4,096 elements from its first on; elements missing from the last
// one count as 0. Element i of a block belongs to column i % 128. A column is added row by row in
// float64; then columns are added by halving: c += c + 64, then + 32, + 16, ..., + 1. The blocks'
// sums are added one by one, in the order of a gradient's blocks and of the group's gradients.
#pragma once

#include <cmath>
#include <cstdint>

#include "core/dtype.h"
#include "core/span.h"

namespace hift {

inline constexpr std::int64_t kNormBlock = 4096;
inline constexpr int kNormColumns = 128;

/// `count` contiguous elements of one gradient.
struct Gradient {
  const void* data = nullptr;
  std::int64_t count = 0;
  DType dtype = DType::kFloat32;
};

constexpr std::int64_t norm_blocks(std::int64_t count) {
  return (count + kNormBlock - 1) / kNormBlock;
}

/// How a norm becomes a coefficient. `grad_scale` is what the gradients were multiplied by.
struct Clip {
  const float* grad_scale = nullptr;  // null: by nothing
  float limit = 0.0f;
  float* norm = nullptr;         // gets the norm of the gradients without their scale
  float* coefficient = nullptr;  // gets what brings that down to `limit`, at most 1
};

namespace HIFT_NS {

/// The product of two floats is exact in double: fused or not, the sum has the same bits.
HIFT_INLINE double add_square(double sum, float x) {
  const double wide = x;
#if defined(__CUDA_ARCH__)
  return fma(wide, wide, sum);
#else
  return sum + wide * wide;
#endif
}

/// As torch.nn.utils.clip_grad_norm_ has it: a NaN stays one, an infinite norm gives 0.
HIFT_INLINE void write_norm(double sum_of_squares, const Clip& clip) {
  double norm = sqrt(sum_of_squares);
  if (clip.grad_scale != nullptr) norm /= *clip.grad_scale;
  const double coefficient = clip.limit / (norm + 1e-6);
  *clip.norm = static_cast<float>(norm);
  *clip.coefficient = static_cast<float>(coefficient > 1.0 ? 1.0 : coefficient);
}

}  // namespace HIFT_NS

}  // namespace hift
