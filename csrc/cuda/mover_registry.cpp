// SPDX-License-Identifier: Apache-2.0
// A group's streams lie back to back in its slab, so one range covers them.
#include "cuda/mover_registry.h"

#include <utility>

namespace hift::cuda {

const Registration& Registry::add(const RamStore& store, const PageTable& table, int group) {
  const auto found = groups_.find(group);
  if (found != groups_.end()) return found->second.range;
  Registration range(store.stream_address(table, group, 0), table.group_bytes(group), device_);
  return groups_.emplace(group, Entry{store.slab(group), std::move(range)}).first->second.range;
}

}  // namespace hift::cuda
