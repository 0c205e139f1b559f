// SPDX-License-Identifier: Apache-2.0
// A pager over memory, behind a gate and faults, whose pages hold values that show which bytes
// they are.
#pragma once

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <memory>
#include <vector>

#include "check.h"
#include "paging/file_store.h"
#include "paging/host_mover.h"
#include "paging/pager.h"
#include "paging_stores.h"

namespace hift_test {

using namespace hift;

inline constexpr std::int64_t kPage = 1024;  // elements
inline constexpr std::uint32_t kFill = 0x01020304;

/// Two streams (zero, and a pattern); groups of `pages` pages each. Every element of a page that
/// was touched holds the page's value.
struct Rig {
  explicit Rig(int slots, std::vector<int> pages = {4, 3})
      : table({{4, 0}, {2, kFill}}, 6 * kPage), faults(ram), gate(faults) {
    for (const int n : pages) table.add_group(n * kPage - 10);
    gate.grow(table);
    if (slots > 0) {
      mover = std::make_unique<HostMover>(gate, table, slots, table.max_record_bytes(), 2, 2);
    }
    store = slots > 0 ? static_cast<Store*>(&gate) : &ram;
    pager = std::make_unique<Pager>(table, *store, mover.get(), slots);
  }
  ~Rig() {
    gate.open();
    pager.reset();
    mover.reset();
  }
  void set(const PageView& view, std::int64_t p, int value) {
    std::memset(view.stream[0], value, static_cast<std::size_t>(table.page(p).count * 4));
    std::memset(view.stream[1], value, static_cast<std::size_t>(table.page(p).count * 2));
  }
  bool all(const std::byte* bytes, std::int64_t n, int value) {
    return std::all_of(bytes, bytes + n, [&](std::byte b) { return b == std::byte(value); });
  }
  bool has(const PageView& view, std::int64_t p, int value) {
    return all(view.stream[0], table.page(p).count * 4, value) &&
           all(view.stream[1], table.page(p).count * 2, value);
  }
  bool is_fresh(const PageView& view, std::int64_t p) {
    bool fresh = all(view.stream[0], table.page(p).count * 4, 0);
    for (std::int64_t i = 0; i < table.page(p).count; ++i) {
      fresh = fresh && view.stream[1][2 * i] == std::byte{4} &&
              view.stream[1][2 * i + 1] == std::byte{3};
    }
    return fresh;
  }
  bool store_has(std::int64_t p, int value) {
    return all(ram.address(table, table.page(p), 0), table.page(p).count * 4, value) &&
           all(ram.address(table, table.page(p), 1), table.page(p).count * 2, value);
  }
  /// Gives a page a value, through acquire and release.
  void update(std::int64_t p, int value) {
    set(pager->acquire(p, nullptr), p, value);
    pager->release(p, nullptr, true);
  }
  /// Page p gets value p + 1, all write-backs done, the log and the counters empty.
  void update_all() {
    for (std::int64_t p = 0; p < table.pages(); ++p) update(p, static_cast<int>(p) + 1);
    pager->flush();
    gate.take_events();
    pager->take_counters();
  }
  bool reads(std::int64_t p, int value) {
    const Page& page = table.page(p);
    std::vector<std::byte> got(page.count * 4);
    pager->read(page.group, 0, page.begin, page.count, got.data());
    const bool first = all(got.data(), page.count * 4, value);
    pager->read(page.group, 1, page.begin, page.count, got.data());
    return first && all(got.data(), page.count * 2, value);
  }
  void writes(std::int64_t p, int value) {
    const Page& page = table.page(p);
    const std::vector<std::byte> from(page.count * 4, std::byte(value));
    pager->write(page.group, 0, page.begin, page.count, from.data());
    pager->write(page.group, 1, page.begin, page.count, from.data());
  }
  std::int64_t record() { return table.record_bytes(table.page(0)); }

  PageTable table;
  RamStore ram;
  FaultStore faults;
  GateStore gate;
  Store* store;
  std::unique_ptr<HostMover> mover;
  std::unique_ptr<Pager> pager;
};

}  // namespace hift_test
