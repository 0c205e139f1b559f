// SPDX-License-Identifier: Apache-2.0
// Parameters on a GPU: pages of a slab travel through a ring in device memory or are updated over
// the bus where they are, pages of a file travel through pinned slots as well.
#include <utility>

#include "core/check.h"
#include "engine_compute.h"
#if HIFT_CUDA
#include "cuda/mover.h"
#include "cuda/step.h"
#endif

namespace hift {

#if HIFT_CUDA
namespace {

class CudaCompute final : public Compute {
 public:
  CudaCompute(int device, Allocate allocate)
      : device_(device),
        allocate_(std::move(allocate)),
        registry_(device),
        done_(device),
        updates_(device) {}

  ~CudaCompute() override {
    try {
      // Kernels may still be at work on registered memory.
      done_.wait();
    } catch (...) {
      // The context is gone, and its work with it.
    }
  }

  void step(const Span* spans, std::size_t count, const Scaling& scaling, int /*threads*/,
            void* stream) override {
    const cuda::DeviceGuard guard(device_);
    const auto queue = static_cast<cudaStream_t>(stream);
    updates_.time(queue, {Interval::Kind::kUpdate},
                  [&] { cuda::step(spans, count, scaling, device_, stream); });
    // The step is queued and cannot be taken back: without the event the host waits for it.
    if (!done_.try_record(queue)) cudaStreamSynchronize(queue);
  }

  bool has_own_memory() const override { return true; }

  std::unique_ptr<Mover> make_mover(Store& store, const PageTable& table, int slots,
                                    std::int64_t slot_bytes, int readers, int writers) override {
    const auto memory = static_cast<std::byte*>(allocate_(slots * slot_bytes));
    const cuda::RingMemory ring{memory, slots, slot_bytes, device_};
    if (auto* ram = dynamic_cast<RamStore*>(&store)) {
      return std::make_unique<cuda::RamMover>(*ram, table, registry_, ring);
    }
    return std::make_unique<cuda::FileMover>(store, table, ring, readers, writers);
  }

  std::byte* reach(const RamStore& store, const PageTable& table, int group,
                   std::byte* host) override {
    return static_cast<std::byte*>(registry_.add(store, table, group).mapped(host));
  }

  void wait() override {
    const cuda::DeviceGuard guard(device_);
    // Kernels update pages in host memory, and change slots that are to be looked at.
    done_.wait();
  }

  double take_update_ms() override { return updates_.take_ms(); }

  void log_to(IntervalLog& log) override { updates_.log_to(log); }

 private:
  int device_;
  Allocate allocate_;
  cuda::Registry registry_;
  cuda::Event done_;  // the last step
  cuda::Stopwatch updates_;
};

}  // namespace

std::unique_ptr<Compute> make_cuda_compute(int device, Allocate allocate) {
  return std::make_unique<CudaCompute>(device, std::move(allocate));
}
#else
std::unique_ptr<Compute> make_cuda_compute(int device, Allocate /*allocate*/) {
  throw std::runtime_error(
      text("this build has no CUDA, and parameters are on CUDA device ", device));
}
#endif

}  // namespace hift
