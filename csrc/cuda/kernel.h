// SPDX-License-Identifier: Apache-2.0
// The kernel: a table of spans in its argument, a block for every run of elements, a rule applied
// in registers. Compiled by nvcc, and as plain C++ by the tests, which run every block and thread
// in turn.
#pragma once

#include <cstdint>
#include <utility>

#include "core/dtype.h"
#include "core/span.h"
#include "rules/all.h"

namespace hift::cuda {

using namespace HIFT_NS;

inline constexpr int kThreads = 256;
inline constexpr int kRounds = 4;
inline constexpr int kBlocksPerSm = 4;
inline constexpr int kArgumentBytes = 4096;  // what every driver takes as a kernel's argument

/// N neighbouring elements, moved by one access.
template <class T, int N>
struct alignas(sizeof(T) * N) Pack {
  T at[N];
};

/// One span as the kernel sees it.
template <class RuleT, class ParamT, class GradT>
struct Work {
  using Rule = RuleT;
  using Param = ParamT;
  using Grad = GradT;
  using States = std::make_integer_sequence<int, Rule::states>;

  // 16 bytes of the widest type involved: every access of a warp is then one unbroken run. Eight
  // elements beside fp32 state would split each of its runs in two halves, which the L2 sees as
  // twice the writes.
  static constexpr int kWidth = Rule::states > 0 || sizeof(Param) == 4 || sizeof(Grad) == 4 ? 4 : 8;

  // A block for every such run of elements. Four blocks fit on an SM (see the launch bounds), which
  // keeps 1,024 threads x 16 bytes x every stream in flight: several times what latency x bandwidth
  // asks for, on an A6000 as on an H100. So the pass is bound by memory; a run of four rounds pays
  // for finding the span, and is short enough that the last blocks to finish leave the GPU idle for
  // microseconds only, whatever its number of SMs.
  static constexpr std::int64_t kRun = std::int64_t{kThreads} * kWidth * kRounds;

  Param* param;
  const Grad* grad;
  float* state[Rule::states > 0 ? Rule::states : 1];
  std::int64_t count;
  typename Rule::Hyper hyper;
  float grad_factor;
  std::uint32_t first_block;
  bool packed;  // every address is aligned for Packs of kWidth
};

/// A launch's argument.
template <class WorkT>
struct Table {
  using Work = WorkT;
  static constexpr int kCapacity =
      static_cast<int>((kArgumentBytes - sizeof(Scaling) - sizeof(std::int64_t)) / sizeof(Work));

  Scaling scaling;
  int size;
  Work work[kCapacity];
};

/// Updates elements [i, i + N) in registers: loop and tail are this one function.
template <int N, class Work, int... S>
HIFT_FN void update(const Work& w, std::int64_t i, float grad_factor,
                    std::integer_sequence<int, S...>) {
  using Params = Pack<typename Work::Param, N>;
  using Grads = Pack<typename Work::Grad, N>;
  using Floats = Pack<float, N>;
  Params& to = *reinterpret_cast<Params*>(w.param + i);
  Params params = to;
  const Grads grads = *reinterpret_cast<const Grads*>(w.grad + i);
  [[maybe_unused]] Floats state[] = {*reinterpret_cast<const Floats*>(w.state[S] + i)..., Floats{}};
  for (int k = 0; k < N; ++k) {
    float p = load(params.at[k]);
    Work::Rule::update(p, load(grads.at[k]) * grad_factor, state[S].at[k]..., w.hyper);
    store(params.at[k], p);
  }
  to = params;
  ((*reinterpret_cast<Floats*>(w.state[S] + i) = state[S]), ...);
}

/// The last span whose first block is not after `block`.
template <class Table>
HIFT_FN int find(const Table& table, std::uint32_t block) {
  int low = 0, high = table.size;
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    (table.work[middle].first_block <= block ? low : high) = middle;
  }
  return low;
}

template <class Table>
__global__ void __launch_bounds__(kThreads, kBlocksPerSm)
    update_spans(const __grid_constant__ Table table) {
  using Work = typename Table::Work;
  constexpr int N = Work::kWidth;
  const Scaling& scaling = table.scaling;
  if (scaling.found_inf != nullptr && *scaling.found_inf != 0.0f) return;

  const Work& w = table.work[find(table, blockIdx.x)];
  // The host divides in double: a quotient of two floats rounds to the same float either way.
  float grad_factor = scaling.clip != nullptr ? *scaling.clip : 1.0f;
  if (scaling.grad_scale != nullptr) grad_factor /= *scaling.grad_scale;
  grad_factor *= w.grad_factor;

  const std::int64_t begin = std::int64_t{blockIdx.x - w.first_block} * Work::kRun;
  const std::int64_t end = w.count - begin < Work::kRun ? w.count : begin + Work::kRun;
  const std::int64_t packed_end = w.packed ? end - (end - begin) % N : begin;
  for (std::int64_t i = begin + std::int64_t{threadIdx.x} * N; i < packed_end; i += kThreads * N) {
    update<N>(w, i, grad_factor, typename Work::States());
  }
  for (std::int64_t i = packed_end + threadIdx.x; i < end; i += kThreads) {
    update<1>(w, i, grad_factor, typename Work::States());
  }
}

}  // namespace hift::cuda
