// SPDX-License-Identifier: Apache-2.0
// Blocks are shared by threads, each into its own place; the caller adds what they found in order.
#include "cpu/norm.h"

#include <algorithm>
#include <memory>
#include <vector>

#include "core/check.h"
#include "cpu/pool.h"
#include "cpu/table.h"

namespace hift::cpu {
namespace {

// As for an update: below this a thread's wake-up costs more than the work it takes over.
constexpr std::int64_t kMinBlocksPerThread = 8;

}  // namespace

double sum_of_squares(const Gradient* gradients, std::size_t count, int threads) {
  std::vector<std::int64_t> first(count);  // block at which gradient i starts
  std::int64_t total = 0;
  for (std::size_t i = 0; i < count; ++i) {
    const Gradient& g = gradients[i];
    const int type = static_cast<int>(g.dtype);
    check_argument(type >= 0 && type < 3, "a gradient of type ", type, " has no norm");
    check_argument(g.count >= 0, "a gradient's count must not be negative: ", g.count);
    check_argument(g.data != nullptr || g.count == 0, "a gradient of ", g.count,
                   " elements has a null address");
    first[i] = total;
    total += norm_blocks(g.count);
  }
  check_argument(threads >= 1, "threads must be at least 1: ", threads);

  const SquareSums* square_sums = set_in_use().square_sums;
  // Not initialised: each block's place is written before it is read.
  const std::unique_ptr<double[]> sums(new double[static_cast<std::size_t>(total)]);
  const std::int64_t useful = 1 + (total - 1) / kMinBlocksPerThread;
  const std::int64_t grain = std::clamp<std::int64_t>(total / (std::int64_t{32} * threads), 4, 64);
  parallel_for(
      total, grain, static_cast<int>(std::min<std::int64_t>(useful, threads)),
      [&](std::int64_t begin, std::int64_t end) {
        // The gradient in which `begin` lies: the last that does not start after it.
        std::size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
        for (; i < count && first[i] < end; ++i) {
          const std::int64_t from = std::max<std::int64_t>(begin - first[i], 0);
          const std::int64_t to = std::min(end - first[i], norm_blocks(gradients[i].count));
          if (from >= to) continue;
          square_sums[static_cast<int>(gradients[i].dtype)](gradients[i], from, to,
                                                            &sums[first[i] + from]);
        }
      });
  double sum = 0.0;
  for (std::int64_t block = 0; block < total; ++block) sum += sums[block];
  return sum;
}

void write_clip(double sum_of_squares, const Clip& clip) {
  generic::write_norm(sum_of_squares, clip);
}

}  // namespace hift::cpu
