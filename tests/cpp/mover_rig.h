// SPDX-License-Identifier: Apache-2.0
// A mover over six pages in memory, behind a gate and faults; page p is filled with byte p.
// The gate shows which copies have started.
#pragma once

#include <dirent.h>
#include <signal.h>
#include <sys/resource.h>
#include <sys/wait.h>
#include <unistd.h>

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <fstream>
#include <memory>
#include <set>
#include <string>

#include "check.h"
#include "paging/host_mover.h"
#include "paging_stores.h"

namespace hift_test {

using namespace hift;
using Failure = std::system_error;

inline constexpr std::int64_t kRecord = 4096;

/// Six one-record pages in memory, page p filled with byte p, behind a gate and faults.
struct Rig {
  explicit Rig(int slots, int readers = 2, int writers = 2)
      : table({{4, 0}}, kRecord), faults(ram), gate(faults) {
    table.add_group(6 * 1024);
    gate.grow(table);
    for (int p = 0; p < 6; ++p) std::memset(stored(p), p, kRecord);
    mover = std::make_unique<HostMover>(gate, table, slots, kRecord, readers, writers);
  }
  ~Rig() {
    gate.open();
    mover.reset();
  }
  const Page& page(std::int64_t p) { return table.page(p); }
  std::byte* stored(std::int64_t p) { return ram.address(table, table.page(p), 0); }
  void fetch(std::int64_t p, int slot) { mover->fetch(page(p), slot); }
  void write_back(std::int64_t p, int slot) { mover->write_back(page(p), slot, nullptr); }
  void put(int slot, int value) { std::memset(mover->slot_address(slot), value, kRecord); }
  bool slot_has(int slot, int value) { return all(mover->slot_address(slot), value); }
  bool store_has(std::int64_t p, int value) { return all(stored(p), value); }
  static bool all(const std::byte* bytes, int value) {
    return std::all_of(bytes, bytes + kRecord, [&](std::byte b) { return b == std::byte(value); });
  }

  PageTable table;
  RamStore ram;
  FaultStore faults;
  GateStore gate;
  std::unique_ptr<HostMover> mover;
};

inline double cpu_ms() {
  struct rusage usage;
  ::getrusage(RUSAGE_SELF, &usage);
  const auto ms = [](const timeval& t) { return t.tv_sec * 1e3 + t.tv_usec * 1e-3; };
  return ms(usage.ru_utime) + ms(usage.ru_stime);
}

}  // namespace hift_test
