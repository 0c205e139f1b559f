// SPDX-License-Identifier: Apache-2.0
// The simulated runtime's memory: blocks of device memory between pages nobody may touch, and
// ranges of host memory that are registered.
#pragma once

#include <cstddef>

#include "sim.h"

namespace hift_sim {

std::byte* add_block(std::size_t bytes);  // filled with a poison
bool remove_block(std::byte* address);
bool in_block(const void* address, std::size_t bytes);

bool add_range(std::byte* address, std::size_t bytes);  // false: overlaps another one
bool remove_range(std::byte* address, std::size_t* bytes);
bool in_range(const void* address, std::size_t bytes);

Stats& counts();

}  // namespace hift_sim
