// SPDX-License-Identifier: Apache-2.0
// Fills tables with gradients of one type and launches, as step.cu does with spans; then a launch
// each for the total and for the coefficient.
#include "cuda/norm.h"

#include <limits>
#include <vector>

#include "core/check.h"
#ifndef HIFT_HOST_KERNEL
#include "cuda/runtime.h"
#endif
#include "cuda/norm_kernel.h"

namespace hift::cuda {
namespace {

/// Sums the blocks of those gradients that are of type Grad; `places[i]` is where those of the i-th
/// go.
template <class Grad>
void sum_blocks(DType type, const Gradient* gradients, const std::vector<double*>& places,
                void* stream) {
  using Table = NormTable<Grad>;
  static_assert(sizeof(Table) <= kArgumentBytes && Table::kCapacity >= 32);
  constexpr std::int64_t kMaxBlocks = std::numeric_limits<std::int32_t>::max();

  Table table;
  table.size = 0;
  std::int64_t blocks = 0;
  const auto flush = [&] {
    if (table.size == 0) return;
    table.blocks = static_cast<std::uint32_t>(blocks);
    launch(square_sums<Table>, (blocks - 1) / kWarps + 1, kThreads, stream, table);
    table.size = 0;
    blocks = 0;
  };
  for (std::size_t i = 0; i < places.size(); ++i) {
    const Gradient& g = gradients[i];
    if (g.dtype != type || g.count == 0) continue;
    const std::int64_t more = norm_blocks(g.count);
    check_argument(more <= kMaxBlocks, "a gradient of ", g.count,
                   " elements does not fit into a launch");
    if (table.size == Table::kCapacity || more > kMaxBlocks - blocks) flush();
    NormWork<Grad>& w = table.work[table.size++];
    w.grad = static_cast<const Grad*>(g.data);
    w.count = g.count;
    w.sums = places[i];
    w.first_block = static_cast<std::uint32_t>(blocks);
    w.packed = reinterpret_cast<std::uintptr_t>(g.data) % sizeof(Pack<Grad, kNormWidth>) == 0;
    blocks += more;
  }
  flush();
}

}  // namespace

void sum_of_squares(const Gradient* gradients, std::size_t count, double* sums, double* total,
                    int device, void* stream) {
  std::vector<double*> places(count);
  std::int64_t blocks = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const Gradient& g = gradients[i];
    const int type = static_cast<int>(g.dtype);
    check_argument(type >= 0 && type < 3, "a gradient of type ", type, " has no norm");
    check_argument(g.count >= 0, "a gradient's count must not be negative: ", g.count);
    check_argument(g.data != nullptr || g.count == 0, "a gradient of ", g.count,
                   " elements has a null address");
    places[i] = sums + blocks;
    blocks += norm_blocks(g.count);
  }
  check_argument(total != nullptr && (sums != nullptr || blocks == 0), "the sums of ", blocks,
                 " blocks, or their total, have a null address");
  const DeviceGuard guard(device);
  sum_blocks<float>(DType::kFloat32, gradients, places, stream);
  sum_blocks<BFloat16>(DType::kBFloat16, gradients, places, stream);
  sum_blocks<Float16>(DType::kFloat16, gradients, places, stream);
  launch(add_up, 1, kLanes, stream, Addends{sums, blocks, total});
}

void write_clip(const double* total, const Clip& clip, int device, void* stream) {
  const DeviceGuard guard(device);
  launch(make_clip, 1, 1, stream, ClipOf{total, clip});
}

}  // namespace hift::cuda
