// SPDX-License-Identifier: Apache-2.0
// A block ends where an inaccessible page begins, so that a kernel that runs over the end faults.
// In a guarded schedule the whole block is inaccessible while no operation runs.
#include "memory.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>
#include <map>

#include "streams.h"

namespace hift_sim {
namespace {

constexpr std::size_t kAlignment = 256;  // what cudaMalloc promises

struct Block {
  std::byte* mapped;
  std::size_t pages;  // bytes of the accessible pages, which begin one page after `mapped`
  std::size_t bytes;
};

std::map<std::byte*, Block>& blocks() {
  static auto& all = *new std::map<std::byte*, Block>;
  return all;
}

std::map<const std::byte*, std::size_t>& ranges() {
  static auto& all = *new std::map<const std::byte*, std::size_t>;
  return all;
}

std::size_t page_bytes() { return static_cast<std::size_t>(::sysconf(_SC_PAGESIZE)); }

void protect(const Block& block, int protection) {
  ::mprotect(block.mapped + page_bytes(), block.pages, protection);
}

}  // namespace

std::byte* add_block(std::size_t bytes) {
  const std::size_t page = page_bytes();
  const std::size_t rounded = (bytes + kAlignment - 1) / kAlignment * kAlignment;
  const std::size_t pages = (rounded + page - 1) / page * page;
  void* mapped = ::mmap(nullptr, pages + 2 * page, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (mapped == MAP_FAILED) return nullptr;
  const Block block{static_cast<std::byte*>(mapped), pages, bytes};
  protect(block, PROT_READ | PROT_WRITE);
  std::memset(block.mapped + page, 0xff, pages);  // NaN
  std::byte* const address = block.mapped + page + pages - rounded;
  blocks()[address] = block;
  if (guarded()) protect(block, PROT_NONE);
  ++counts().device_blocks;
  return address;
}

bool remove_block(std::byte* address) {
  const auto found = blocks().find(address);
  if (found == blocks().end()) return false;
  ::munmap(found->second.mapped, found->second.pages + 2 * page_bytes());
  blocks().erase(found);
  --counts().device_blocks;
  return true;
}

bool in_block(const void* address, std::size_t bytes) {
  const auto* begin = static_cast<const std::byte*>(address);
  auto after = blocks().upper_bound(const_cast<std::byte*>(begin));
  if (after == blocks().begin()) return false;
  --after;
  return begin + bytes <= after->first + after->second.bytes;
}

void open_device_memory(bool open) {
  if (!guarded()) return;
  for (const auto& [address, block] : blocks()) {
    protect(block, open ? PROT_READ | PROT_WRITE : PROT_NONE);
  }
}

bool add_range(std::byte* address, std::size_t bytes) {
  const auto after = ranges().lower_bound(address + bytes);
  if (after != ranges().begin()) {
    const auto before = std::prev(after);
    if (before->first + before->second > address) return false;
  }
  ranges()[address] = bytes;
  ++counts().registrations;
  return true;
}

bool remove_range(std::byte* address, std::size_t* bytes) {
  const auto found = ranges().find(address);
  if (found == ranges().end()) return false;
  *bytes = found->second;
  ranges().erase(found);
  --counts().registrations;
  return true;
}

bool in_range(const void* address, std::size_t bytes) {
  const auto* begin = static_cast<const std::byte*>(address);
  auto after = ranges().upper_bound(begin);
  if (after == ranges().begin()) return false;
  --after;
  return begin + bytes <= after->first + after->second;
}

}  // namespace hift_sim
