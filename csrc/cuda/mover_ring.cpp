// SPDX-License-Identifier: Apache-2.0
// Each line that makes one stream wait for another stands under its reason. Copies of different
// slots overlap, in both directions; within a slot everything has an order.
#include "cuda/mover_ring.h"

#include <algorithm>
#include <cstring>

#include "cuda/fill.h"

namespace hift::cuda {
namespace {

constexpr std::int64_t kBounceBytes = std::int64_t{1} << 20;

/// Ends an issue that failed midway: what was issued must not run into what comes next.
void give_up(cudaStream_t stream) {
  // Copies that were issued before the refusal still run.
  cudaStreamSynchronize(stream);
  cudaGetLastError();
}

Interval copy_of(const Page& page, Interval::Kind kind,
                 const std::vector<DeviceRing::Part>& parts) {
  Interval copy{kind, page.group, page.index};
  for (const DeviceRing::Part& p : parts) copy.bytes += p.bytes;
  return copy;
}

}  // namespace

DeviceRing::DeviceRing(std::byte* memory, int slots, std::int64_t slot_bytes, int device)
    : memory_(memory),
      slot_bytes_(slot_bytes),
      device_(device),
      bounce_memory_(kBounceBytes),
      bounce_(bounce_memory_.data(), kBounceBytes, device),
      in_(device),
      out_(device),
      aside_(device),
      copies_(device),
      waits_(device) {
  for (int s = 0; s < slots; ++s) slots_.emplace_back(device);
}

DeviceRing::~DeviceRing() { finish(); }

void DeviceRing::finish() noexcept {
  // Copies use the ring and the host's memory, which go next.
  for (const Stream* stream : {&in_, &out_, &aside_}) cudaStreamSynchronize(stream->get());
}

void DeviceRing::copy_in(const Page& page, int slot, const std::vector<Part>& parts, int after) {
  const DeviceGuard guard(device_);
  const std::lock_guard<std::mutex> lock(mutex_);
  Slot& s = slots_[slot];
  try {
    if (s.in_use) {
      // The page before was released as it was: kernels may still read the slot.
      s.used.record(s.stream);
      s.used.hold(in_.get());
      s.in_use = false;
    }
    // The page before is still on its way out of the slot.
    s.left.hold(in_.get());
    // The page's own last bytes are still on their way to the host, out of another slot.
    if (after >= 0) slots_[after].left.hold(in_.get());
    copies_.time(in_.get(), copy_of(page, Interval::Kind::kIn, parts), [&] {
      for (const Part& p : parts) {
        check(cudaMemcpyAsync(address(slot) + p.offset, p.host, static_cast<std::size_t>(p.bytes),
                              cudaMemcpyHostToDevice, in_.get()),
              "cudaMemcpyAsync", p.bytes, " bytes to the device");
      }
    });
    // Who is handed the slot waits for this.
    s.arrived.record(in_.get());
  } catch (...) {
    // The caller may give the slot to another page.
    give_up(in_.get());
    throw;
  }
}

void DeviceRing::hand_over(int slot, cudaStream_t stream) {
  const DeviceGuard guard(device_);
  Slot& s = slots_[slot];
  if (s.in_use && s.stream != stream) {
    // The slot was last used on another stream.
    s.used.record(s.stream);
    s.used.hold(stream);
  }
  waits_.time(stream, {Interval::Kind::kWait}, [&] {
    // The page's bytes are on their way in.
    s.arrived.hold(stream);
    // The bytes that are about to change are still on their way out.
    s.left.hold(stream);
  });
  s.stream = stream;
  s.in_use = true;
}

void DeviceRing::copy_out(const Page& page, int slot, const std::vector<Part>& parts) {
  const DeviceGuard guard(device_);
  const std::lock_guard<std::mutex> lock(mutex_);
  Slot& s = slots_[slot];
  // The kernels that change the slot are still under way.
  s.used.record(s.stream);
  s.used.hold(out_.get());
  // A page that came in and that nobody awaited is still on its way.
  s.arrived.hold(out_.get());
  // Where CUDA refuses a part, those before it still go: the caller keeps the slot as it is until
  // all have gone again, behind them on the same stream.
  copies_.time(out_.get(), copy_of(page, Interval::Kind::kOut, parts), [&] {
    for (const Part& p : parts) {
      check(cudaMemcpyAsync(p.host, address(slot) + p.offset, static_cast<std::size_t>(p.bytes),
                            cudaMemcpyDeviceToHost, out_.get()),
            "cudaMemcpyAsync", p.bytes, " bytes to the host");
    }
  });
  // Who refills or changes the slot, or fetches the page, waits for this.
  s.left.record(out_.get());
  s.in_use = false;
}

void DeviceRing::wait_in(int slot) {
  const DeviceGuard guard(device_);
  // The host's side of the record is about to be overwritten.
  slots_[slot].arrived.wait();
}

void DeviceRing::wait_out(int slot) {
  const DeviceGuard guard(device_);
  // The host's side of the record is about to be read.
  slots_[slot].left.wait();
}

void DeviceRing::wait(int slot) {
  const DeviceGuard guard(device_);
  Slot& s = slots_[slot];
  // The host is about to look at the slot,
  s.arrived.wait();
  // or at the page in its store,
  s.left.wait();
  if (!s.in_use) return;
  // and kernels may still change the slot.
  s.used.record(s.stream);
  s.used.wait();
  s.in_use = false;
}

void DeviceRing::drain() {
  const DeviceGuard guard(device_);
  for (const Stream* stream : {&in_, &out_, &aside_}) {
    // The host is about to look at the store.
    check(cudaStreamSynchronize(stream->get()), "cudaStreamSynchronize", "a stream of copies");
  }
}

void DeviceRing::fill(int slot, std::int64_t offset, std::int64_t count,
                      const hift::Stream& pattern, cudaStream_t stream) {
  // A run's value is words that are all alike.
  const std::int64_t bytes = std::min<std::int64_t>(pattern.value_bytes, 4);
  cuda::fill(address(slot) + offset, pattern.bytes(count) / bytes, bytes, pattern.fill, device_,
             stream);
  slots_[slot].stream = stream;
  slots_[slot].in_use = true;
}

template <class Visit>
void DeviceRing::in_pieces(int slot, std::int64_t bytes, Visit visit) {
  const DeviceGuard guard(device_);
  Slot& s = slots_[slot];
  if (s.in_use) {
    // A fill, say, that was queued a moment ago.
    s.used.record(s.stream);
    s.used.hold(aside_.get());
  }
  try {
    for (std::int64_t done = 0; done < bytes; done += kBounceBytes) {
      visit(bounce_memory_.data(), done,
            static_cast<std::size_t>(std::min(bytes - done, kBounceBytes)));
    }
  } catch (...) {
    // The bounce buffer is about to be used again.
    give_up(aside_.get());
    throw;
  }
}

void DeviceRing::peek(int slot, std::int64_t offset, std::int64_t bytes, std::byte* to) {
  in_pieces(slot, bytes, [&](std::byte* bounce, std::int64_t done, std::size_t size) {
    check(cudaMemcpyAsync(bounce, address(slot) + offset + done, size, cudaMemcpyDeviceToHost,
                          aside_.get()),
          "cudaMemcpyAsync", size, " bytes to the host");
    // The bytes are about to be read from the bounce buffer.
    check(cudaStreamSynchronize(aside_.get()), "cudaStreamSynchronize", "reading a slot");
    std::memcpy(to + done, bounce, size);
  });
}

void DeviceRing::poke(int slot, std::int64_t offset, std::int64_t bytes, const std::byte* from) {
  in_pieces(slot, bytes, [&](std::byte* bounce, std::int64_t done, std::size_t size) {
    std::memcpy(bounce, from + done, size);
    check(cudaMemcpyAsync(address(slot) + offset + done, bounce, size, cudaMemcpyHostToDevice,
                          aside_.get()),
          "cudaMemcpyAsync", size, " bytes to the device");
    // The bounce buffer is about to be overwritten, or the slot used.
    check(cudaStreamSynchronize(aside_.get()), "cudaStreamSynchronize", "writing a slot");
  });
}

double DeviceRing::take_copy_ms() {
  const std::lock_guard<std::mutex> lock(mutex_);
  return copies_.take_ms();
}

double DeviceRing::take_wait_ms() { return waits_.take_ms(); }

void DeviceRing::log_to(IntervalLog& log) {
  const std::lock_guard<std::mutex> lock(mutex_);
  copies_.log_to(log);
  waits_.log_to(log);
}

}  // namespace hift::cuda
