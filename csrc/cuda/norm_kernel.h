// SPDX-License-Identifier: Apache-2.0
// The kernels of a norm: a warp for every block of a gradient, then one warp that adds up what they
// found, then one thread that makes the coefficient. Compiled by nvcc, and as plain C++ by tests.
#pragma once

#include "core/norm.h"
#include "cuda/kernel.h"
#include "cuda/warp.h"

namespace hift::cuda {

inline constexpr int kWarps = kThreads / kLanes;
inline constexpr int kNormWidth = kNormColumns / kLanes;  // neighbouring columns that a lane holds

/// One gradient as the kernel sees it.
template <class GradT>
struct NormWork {
  using Grad = GradT;
  const Grad* grad;
  std::int64_t count;
  double* sums;  // a place for each of its blocks
  std::uint32_t first_block;
  bool packed;  // the address is aligned for Packs of kNormWidth
};

/// A launch's argument.
template <class GradT>
struct NormTable {
  using Work = NormWork<GradT>;
  static constexpr int kCapacity =
      static_cast<int>((kArgumentBytes - 2 * sizeof(std::int64_t)) / sizeof(Work));

  int size;
  std::uint32_t blocks;
  Work work[kCapacity];
};

template <class Table>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    square_sums(const __grid_constant__ Table table) {
  using Grad = typename Table::Work::Grad;
  using Grads = Pack<Grad, kNormWidth>;
  constexpr int kRows = static_cast<int>(kNormBlock / kNormColumns);
  // Loads that a lane has under way: with four blocks on an SM as many bytes as an update's.
  constexpr int kAtOnce = 8;

  const std::uint32_t block = blockIdx.x * kWarps + threadIdx.x / kLanes;
  if (block >= table.blocks) return;  // a whole warp
  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const typename Table::Work& w = table.work[find(table, block)];
  const std::int64_t index = block - w.first_block;
  const Grad* const at = w.grad + index * kNormBlock + lane * kNormWidth;
  const std::int64_t left = w.count - index * kNormBlock;

  double column[kNormWidth] = {};
  if (w.packed && left >= kNormBlock) {
    for (int row = 0; row < kRows; row += kAtOnce) {
      Grads grads[kAtOnce];
      for (int r = 0; r < kAtOnce; ++r)
        grads[r] = *reinterpret_cast<const Grads*>(at + (row + r) * kNormColumns);
      for (int r = 0; r < kAtOnce; ++r) {
        for (int k = 0; k < kNormWidth; ++k)
          column[k] = add_square(column[k], load(grads[r].at[k]));
      }
    }
  } else {
    for (std::int64_t i = 0; i + lane * kNormWidth < left && i < kNormBlock; i += kNormColumns) {
      for (int k = 0; k < kNormWidth && i + lane * kNormWidth + k < left; ++k)
        column[k] = add_square(column[k], load(at[i + k]));
    }
  }
  for (int mask = kLanes / 2; mask > 0; mask /= 2) {
    for (int k = 0; k < kNormWidth; ++k) column[k] += shuffle_xor(column[k], mask);
  }
  if (lane == 0) w.sums[index] = (column[0] + column[2]) + (column[1] + column[3]);
}

/// Sums of blocks, in order, and where their sum goes.
struct Addends {
  const double* sums;
  std::int64_t count;
  double* total;
};

/// One warp: its lanes fetch, and hand round what they have, so that an addition waits for the one
/// before and for nothing else.
__global__ void __launch_bounds__(kLanes) add_up(const __grid_constant__ Addends a) {
  constexpr int kAtOnce = 8;
  const int lane = static_cast<int>(threadIdx.x);
  double ahead[kAtOnce], now[kAtOnce];
  const auto fetch = [&](std::int64_t begin) {
    for (int r = 0; r < kAtOnce; ++r) {
      const std::int64_t i = begin + r * kLanes + lane;
      ahead[r] = i < a.count ? a.sums[i] : 0.0;  // which changes no sum
    }
  };
  double sum = 0.0;
  fetch(0);
  for (std::int64_t begin = 0; begin < a.count; begin += kAtOnce * kLanes) {
    for (int r = 0; r < kAtOnce; ++r) now[r] = ahead[r];
    fetch(begin + kAtOnce * kLanes);
    for (int r = 0; r < kAtOnce; ++r) {
      for (int from = 0; from < kLanes; ++from) sum += shuffle(now[r], from);
    }
  }
  if (lane == 0) *a.total = sum;
}

struct ClipOf {
  const double* total;
  Clip clip;
};

/// One thread.
__global__ void __launch_bounds__(kLanes) make_clip(const __grid_constant__ ClipOf c) {
  write_norm(*c.total, c.clip);
}

}  // namespace hift::cuda
