// SPDX-License-Identifier: Apache-2.0
// The loop over a gradient's blocks, for every type. Included once per instruction set, as loop.inl
// is.

#include "core/dtype.h"
#include "core/norm.h"
#include "cpu/ahead.inl"
#include "cpu/table.h"

namespace hift::HIFT_NS {

template <class Grad>
void square_sums_of(const Gradient& gradient, std::int64_t begin, std::int64_t end, double* sums) {
  // One short stream: 16-bit elements go by too fast for the usual distance.
  constexpr std::int64_t ahead = sizeof(Grad) == sizeof(float) ? kAhead : 3 * kAhead;
  for (std::int64_t block = begin; block < end; ++block) {
    const Grad* at = static_cast<const Grad*>(gradient.data) + block * kNormBlock;
    const std::int64_t left = gradient.count - block * kNormBlock;
    const std::int64_t count = left < kNormBlock ? left : kNormBlock;
    alignas(64) double column[kNormColumns] = {};
    for (std::int64_t row = 0; row < count; row += kNormColumns) {
      const std::int64_t here = count - row;
      if (here >= kNormColumns) {
        ask(at + row, kNormColumns, sizeof(Grad), ahead);
#pragma omp simd
        for (int c = 0; c < kNormColumns; ++c) column[c] = add_square(column[c], load(at[row + c]));
      } else {
        for (int c = 0; c < here; ++c) column[c] = add_square(column[c], load(at[row + c]));
      }
    }
    for (int half = kNormColumns / 2; half > 0; half /= 2) {
      for (int c = 0; c < half; ++c) column[c] += column[c + half];
    }
    *sums++ = column[0];
  }
}

const SquareSums* square_sums() {
  static constexpr SquareSums by_type[] = {square_sums_of<float>, square_sums_of<BFloat16>,
                                           square_sums_of<Float16>};
  return by_type;
}

}  // namespace hift::HIFT_NS
