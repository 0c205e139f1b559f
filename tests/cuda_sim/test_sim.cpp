// SPDX-License-Identifier: Apache-2.0
// The simulated runtime itself: it must see what a GPU would punish, or the other tests prove
// nothing. Faults of a kind that ends the program are tried in a child process.
#include <sys/wait.h>
#include <unistd.h>

#include <cstring>
#include <vector>

#include "check.h"
#include "sim.h"

namespace {

using namespace hift_sim;

/// How a child that runs `body` ends: its exit status, or minus the signal.
template <class Body>
int end_of(Body body) {
  std::fflush(nullptr);
  const pid_t child = fork();
  if (child == 0) {
    alarm(20);
    std::freopen("/dev/null", "w", stderr);
    body();
    _exit(0);
  }
  int status = 0;
  waitpid(child, &status, 0);
  return WIFSIGNALED(status) ? -WTERMSIG(status) : WEXITSTATUS(status);
}

struct Device {
  explicit Device(std::size_t bytes) { cudaMalloc(&address, bytes); }
  ~Device() { cudaFree(address); }
  void* address = nullptr;
};

struct Pinned {
  explicit Pinned(std::size_t bytes) : memory(bytes) {
    cudaHostRegister(memory.data(), bytes, cudaHostRegisterDefault);
  }
  ~Pinned() { cudaHostUnregister(memory.data()); }
  std::vector<char> memory;
};

cudaStream_t make_stream(unsigned flags = cudaStreamNonBlocking) {
  cudaStream_t stream = nullptr;
  cudaStreamCreateWithFlags(&stream, flags);
  return stream;
}

/// Order in which operations on two streams ran, over many schedules.
template <class Issue>
std::pair<bool, bool> orders(unsigned flags_a, unsigned flags_b, bool null_b, Issue issue) {
  bool a_first = false, b_first = false;
  for (unsigned seed = 0; seed < 100; ++seed) {
    begin(schedule_of(seed));
    cudaStream_t a = make_stream(flags_a), b = null_b ? nullptr : make_stream(flags_b);
    std::vector<char> order;
    issue(a, b, order);
    cudaStreamSynchronize(a);
    cudaStreamSynchronize(b);
    (order.front() == 'a' ? a_first : b_first) = true;
    cudaStreamDestroy(a);
    if (b != nullptr) cudaStreamDestroy(b);
  }
  return {a_first, b_first};
}

void push(cudaStream_t stream, std::vector<char>& order, char name) {
  enqueue(stream, [&order, name] { order.push_back(name); }, "note");
}

TEST(streams_run_in_either_order) {
  const auto both = orders(cudaStreamNonBlocking, cudaStreamNonBlocking, false,
                           [](cudaStream_t a, cudaStream_t b, std::vector<char>& order) {
                             push(a, order, 'a');
                             push(b, order, 'b');
                           });
  CHECK(both.first && both.second);
}

TEST(an_event_orders_streams_and_keeps_what_it_meant) {
  const auto one = orders(cudaStreamNonBlocking, cudaStreamNonBlocking, false,
                          [](cudaStream_t a, cudaStream_t b, std::vector<char>& order) {
                            cudaEvent_t event;
                            cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
                            push(a, order, 'a');
                            cudaEventRecord(event, a);
                            cudaStreamWaitEvent(b, event, 0);
                            cudaEventRecord(event, a);  // a later record
                            push(b, order, 'b');
                            cudaStreamSynchronize(b);
                            cudaEventDestroy(event);
                          });
  CHECK(one.first && !one.second);
}

TEST(an_event_that_was_never_recorded_holds_nobody) {
  begin(schedule_of(0));
  cudaEvent_t event;
  cudaEventCreateWithFlags(&event, cudaEventDisableTiming);
  cudaStream_t stream = make_stream();
  cudaStreamWaitEvent(stream, event, 0);
  CHECK(cudaStreamSynchronize(stream) == cudaSuccess);
  CHECK(cudaEventSynchronize(event) == cudaSuccess && cudaEventQuery(event) == cudaSuccess);
  cudaStreamDestroy(stream);
  cudaEventDestroy(event);
}

TEST(the_legacy_stream_waits_for_blocking_streams_only) {
  const auto note = [](cudaStream_t a, cudaStream_t b, std::vector<char>& order) {
    push(a, order, 'a');
    push(b, order, 'b');
  };
  const auto blocking = orders(cudaStreamDefault, 0, true, note);
  CHECK(blocking.first && !blocking.second);
  const auto other = orders(cudaStreamNonBlocking, 0, true, note);
  CHECK(other.first && other.second);
}

TEST(nothing_runs_before_a_synchronisation_in_the_laziest_schedule) {
  begin({1, 0.0, false, false});
  cudaStream_t stream = make_stream();
  bool ran = false;
  enqueue(stream, [&] { ran = true; }, "note");
  CHECK(!ran);
  cudaStreamSynchronize(stream);
  CHECK(ran);
  cudaStreamDestroy(stream);
}

TEST(copies_are_checked) {
  begin(schedule_of(0));
  Device device(64);
  Pinned pinned(64);
  std::vector<char> pageable(64);
  char* const on_device = static_cast<char*>(device.address);
  const auto copy = [](void* to, const void* from, std::size_t bytes, cudaMemcpyKind kind) {
    const bool ok = cudaMemcpyAsync(to, from, bytes, kind, nullptr) == cudaSuccess;
    cudaDeviceSynchronize();
    return ok;
  };
  CHECK(copy(on_device, pinned.memory.data(), 64, cudaMemcpyHostToDevice));
  CHECK(copy(pinned.memory.data(), on_device, 64, cudaMemcpyDeviceToHost));
  CHECK(stats().error.empty() && stats().pageable_copies == 0);
  CHECK(copy(on_device, pageable.data(), 64, cudaMemcpyHostToDevice));
  CHECK(stats().pageable_copies == 1);
  CHECK(!copy(on_device + 1, pinned.memory.data(), 64, cudaMemcpyHostToDevice));
  CHECK(!stats().error.empty());
  CHECK(!copy(on_device, pinned.memory.data(), 64, cudaMemcpyDeviceToHost));
  CHECK(!copy(on_device, on_device, 64, cudaMemcpyHostToDevice));
}

TEST(memory_that_copies_use_may_not_be_unregistered) {
  begin({1, 0.0, false, false});
  Device device(64);
  std::vector<char> host(64);
  cudaHostRegister(host.data(), 64, cudaHostRegisterDefault);
  CHECK(cudaHostRegister(host.data() + 8, 8, 0) != cudaSuccess);
  cudaMemcpyAsync(device.address, host.data(), 64, cudaMemcpyHostToDevice, nullptr);
  CHECK(cudaHostUnregister(host.data()) != cudaSuccess);
  cudaDeviceSynchronize();
}

TEST(device_memory_begins_as_poison) {
  begin({1, 1.0, false, false});
  Device device(8);
  Pinned pinned(8);
  cudaMemcpyAsync(pinned.memory.data(), device.address, 8, cudaMemcpyDeviceToHost, nullptr);
  cudaDeviceSynchronize();
  float value = 0;
  std::memcpy(&value, pinned.memory.data(), sizeof value);
  CHECK(value != value, value);
}

TEST(events_belong_to_a_device) {
  begin(schedule_of(0));
  cudaSetDevice(1);
  cudaStream_t stream = make_stream();
  cudaSetDevice(0);
  cudaEvent_t event;
  cudaEventCreateWithFlags(&event, cudaEventDefault);
  CHECK(cudaEventRecord(event, stream) == cudaErrorInvalidResourceHandle);
  CHECK(enqueue(stream, [] {}, "kernel") == cudaErrorInvalidResourceHandle);
  cudaEventDestroy(event);
  cudaStreamDestroy(stream);
}

TEST(a_call_fails_when_it_is_told_to) {
  begin(schedule_of(0));
  fail_call(1);
  int device = 0;
  CHECK(cudaGetDevice(&device) == cudaSuccess);
  CHECK(cudaGetDevice(&device) == cudaErrorUnknown);
  CHECK(cudaGetDevice(&device) == cudaSuccess);
  CHECK(stats().failed_call == "cudaGetDevice", stats().failed_call);
}

#if !defined(__SANITIZE_THREAD__) && \
    !defined(__SANITIZE_ADDRESS__)  // which handle faults themselves
TEST(a_kernel_beyond_its_memory_faults) {
  CHECK(end_of([] {
          Device device(256);
          char* const end = static_cast<char*>(device.address) + 256;
          enqueue(nullptr, [end] { *end = 1; }, "kernel");
          cudaDeviceSynchronize();
        }) == -SIGSEGV);
}

TEST(the_host_faults_on_device_memory) {
  CHECK(end_of([] {
          begin({1, 0.0, false, true});
          Device device(256);
          *static_cast<volatile char*>(device.address) = 1;
        }) == -SIGSEGV);
}
#endif

}  // namespace

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
