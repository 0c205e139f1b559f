// SPDX-License-Identifier: Apache-2.0
// Fills tables with spans and launches: for every kernel that takes a table, whatever its work is.
#pragma once

#include <cstddef>
#include <cstdint>
#include <limits>

#include "core/check.h"
#ifndef HIFT_HOST_KERNEL
#include "cuda/runtime.h"
#endif
#include "cuda/kernel.h"

namespace hift::cuda {

template <int N, class T>
bool aligned(const T* address) {
  return reinterpret_cast<std::uintptr_t>(address) % (sizeof(T) * N) == 0;
}

/// Updates `count` spans by one kernel, in as few launches as the argument's size allows.
template <class Work>
void run_table(void (*kernel)(Table<Work>), Work (*work_of)(const Span&, std::uint32_t),
               const Span* const* spans, std::size_t count, const Scaling& scaling, void* stream,
               int* launches) {
  using Table = Table<Work>;
  using Rule = typename Work::Rule;
  static_assert(Rule::states <= kMaxStates && sizeof(typename Rule::Hyper) <= sizeof(Span::hyper));
  static_assert(sizeof(Table) <= kArgumentBytes && Table::kCapacity >= 24);
  constexpr std::int64_t kMaxBlocks = std::numeric_limits<std::int32_t>::max();  // of a grid

  Table table;
  table.scaling = scaling;
  table.size = 0;
  std::int64_t blocks = 0;
  for (std::size_t i = 0; i < count; ++i) {
    if (table.size == Table::kCapacity) {
      launch(kernel, blocks, kThreads, stream, table);
      ++*launches;
      table.size = 0;
      blocks = 0;
    }
    const std::int64_t first_block = blocks;
    blocks += (spans[i]->count - 1) / Work::kRun + 1;
    check_argument(blocks <= kMaxBlocks, "a span of ", spans[i]->count,
                   " elements does not fit into a launch");
    table.work[table.size++] = work_of(*spans[i], static_cast<std::uint32_t>(first_block));
  }
  launch(kernel, blocks, kThreads, stream, table);
  ++*launches;
}

}  // namespace hift::cuda
