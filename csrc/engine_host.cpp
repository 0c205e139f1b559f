// SPDX-License-Identifier: Apache-2.0
// Parameters in host memory: pages in a slab are updated where they are, pages of a file in slots
// that threads fill and empty.
#include <utility>

#include "cpu/step.h"
#include "engine_compute.h"
#include "paging/host_mover.h"

namespace hift {
namespace {

class HostCompute final : public Compute {
 public:
  void step(const Span* spans, std::size_t count, const Scaling& scaling, int threads,
            void* /*stream*/) override {
    const auto begin = Clock::now();
    cpu::step(spans, count, scaling, threads);
    const auto end = Clock::now();
    update_ms_ += std::chrono::duration<double, std::milli>(end - begin).count();
    if (log_ != nullptr && log_->on()) {
      log_->add({Interval::Kind::kUpdate, -1, -1, 0, begin, end});
    }
  }

  bool has_own_memory() const override { return false; }

  std::unique_ptr<Mover> make_mover(Store& store, const PageTable& table, int slots,
                                    std::int64_t slot_bytes, int readers, int writers) override {
    return std::make_unique<HostMover>(store, table, slots, slot_bytes, readers, writers);
  }

  std::byte* reach(const RamStore&, const PageTable&, int, std::byte* host) override {
    return host;
  }

  void wait() override {}

  double take_update_ms() override { return std::exchange(update_ms_, 0); }

  void log_to(IntervalLog& log) override { log_ = &log; }

 private:
  double update_ms_ = 0;
  IntervalLog* log_ = nullptr;
};

}  // namespace

std::unique_ptr<Compute> make_host_compute() { return std::make_unique<HostCompute>(); }

}  // namespace hift
