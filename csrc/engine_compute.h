// SPDX-License-Identifier: Apache-2.0
// Where parameters live: who updates spans there, and how pages get there and back.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <memory>

#include "core/intervals.h"
#include "core/span.h"
#include "paging/mover.h"
#include "paging/page_table.h"
#include "paging/store.h"

namespace hift {

class Compute {
 public:
  virtual ~Compute() = default;

  /// Updates spans in place, behind the work queued on `stream` so far. On the host `threads` share
  /// the work and it is done on return.
  virtual void step(const Span* spans, std::size_t count, const Scaling& scaling, int threads,
                    void* stream) = 0;

  /// Whether work on pages in host memory has compute memory of its own to be done in.
  virtual bool has_own_memory() const = 0;

  /// A mover between `store` and a ring of `slots` slots in compute memory. Nothing may be under
  /// way: the ring before goes.
  virtual std::unique_ptr<Mover> make_mover(Store& store, const PageTable& table, int slots,
                                            std::int64_t slot_bytes, int readers, int writers) = 0;

  /// The address by which `step` reaches `host`, which lies in `group` of `store`.
  virtual std::byte* reach(const RamStore& store, const PageTable& table, int group,
                           std::byte* host) = 0;

  /// The host waits for all steps.
  virtual void wait() = 0;

  /// Milliseconds of arithmetic, as far as they are known and were not told before.
  virtual double take_update_ms() = 0;

  /// Updates go to `log` as well, which outlives this.
  virtual void log_to(IntervalLog& log) = 0;
};

std::unique_ptr<Compute> make_host_compute();

/// Gives `bytes` bytes of memory on the device; they stay until the next call, or the engine's end.
using Allocate = std::function<void*(std::int64_t bytes)>;

/// Throws std::runtime_error in a build without CUDA.
std::unique_ptr<Compute> make_cuda_compute(int device, Allocate allocate);

}  // namespace hift
