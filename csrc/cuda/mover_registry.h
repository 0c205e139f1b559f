// SPDX-License-Identifier: Apache-2.0
// Which groups of a slab are registered with CUDA: a range for each, at its first visit, since
// registering commits its memory; never one for each tensor.
#pragma once

#include <cstddef>
#include <memory>
#include <unordered_map>

#include "cuda/handles.h"
#include "paging/page_table.h"
#include "paging/store.h"

namespace hift::cuda {

class Registry {
 public:
  explicit Registry(int device) : device_(device) {}

  /// Registers the group's range, unless it is. Returns it.
  const Registration& add(const RamStore& store, const PageTable& table, int group);

 private:
  struct Entry {
    std::shared_ptr<Slab> slab;  // outlives the registration
    Registration range;
  };
  int device_;
  std::unordered_map<int, Entry> groups_;
};

}  // namespace hift::cuda
