// SPDX-License-Identifier: Apache-2.0
// A training of three groups on a simulated device, step by step, beside the same on the host. The
// backward pass is an operation on the compute stream that writes gradients: a step that reads them
// too early or too late gets others.
#pragma once

#include <cstdint>
#include <cstring>
#include <map>
#include <memory>
#include <random>
#include <string>
#include <utility>
#include <vector>

#include "core/dtype.h"
#include "cpu/step.h"
#include "cuda/handles.h"
#include "engine.h"
#include "sim.h"

namespace hift_sim {

using hift::Engine;
using hift::EngineOptions;
using hift::Update;

inline const std::vector<std::vector<std::int64_t>> kGroups = {
    {700, 33, 0, 1500}, {2600}, {257, 256}};
inline constexpr int kSteps = 9;    // three passes
inline constexpr int kSkipped = 4;  // this step finds an overflow and changes nothing
inline constexpr int kAdded = 2;    // before this step its group joins
inline constexpr float kGarbage = -1e30f;
inline constexpr int kLoaded = 5;      // before this step some state is written from outside
inline constexpr float kFill = 0.25f;  // of the second stream

/// Values of the training, made once.
struct Data {
  std::vector<std::vector<std::vector<float>>> params;  // group, item
  std::vector<std::vector<std::vector<float>>> grads;   // step, item of the step's group
  std::vector<float> loaded;                            // state of group 0, item 3
  static const Data& get() {
    static const Data data = [] {
      Data d;
      std::mt19937 random(7);
      const auto values = [&](std::int64_t count) {
        std::vector<float> v(static_cast<std::size_t>(count));
        for (float& x : v) x = std::uniform_real_distribution<float>(-1, 1)(random);
        return v;
      };
      for (const auto& group : kGroups) {
        d.params.emplace_back();
        for (const std::int64_t count : group) d.params.back().push_back(values(count));
      }
      for (int s = 0; s < kSteps; ++s) {
        d.grads.emplace_back();
        for (const std::int64_t count : kGroups[s % 3]) d.grads.back().push_back(values(count));
      }
      d.loaded = values(kGroups[0][3]);
      return d;
    }();
    return data;
  }
};

/// What a training ends with: parameters, the first stream of state, and all others.
struct Outcome {
  std::vector<std::vector<float>> params, first, second;  // by item, groups in a row
  bool operator==(const Outcome& o) const {
    return same(params, o.params) && same(first, o.first) && same(second, o.second);
  }

 private:
  /// In bits: what is kept in fewer may look like NaN.
  static bool same(const std::vector<std::vector<float>>& a,
                   const std::vector<std::vector<float>>& b) {
    bool equal = a.size() == b.size();
    for (std::size_t i = 0; equal && i < a.size(); ++i) {
      equal =
          a[i].size() == b[i].size() &&
          (a[i].empty() || std::memcmp(a[i].data(), b[i].data(), a[i].size() * sizeof(float)) == 0);
    }
    return equal;
  }
};

/// Values as parameters of 16 bits, two to a float.
inline std::vector<float> halved(const std::vector<float>& values) {
  std::vector<hift::generic::BFloat16> halves((values.size() + 1) / 2 * 2);
  for (std::size_t i = 0; i < values.size(); ++i) hift::generic::store(halves[i], values[i]);
  std::vector<float> words(halves.size() / 2);
  if (!words.empty()) std::memcpy(words.data(), halves.data(), words.size() * sizeof(float));
  return words;
}

inline void set_hyper(Update& u, int step, bool kept) {
  if (kept) {
    u.param_dtype = hift::DType::kBFloat16;
    u.weights = hift::Weights::kSplit;
    u.key = static_cast<std::uint64_t>(step * 100 + u.item);
  }
  u.rule = hift::cpu::rule_number("adamw");
  u.hyper = {0.99f, 0.1f, 0.999f, 0.001f, 0.01f, 1.0f / static_cast<float>(1 + step), 1e-8f};
  u.hypers = 7;
}

/// Streams of both: the second does not begin at zero. Or codes, the lower halves of masters, and
/// scales.
inline std::vector<hift::Stream> streams(bool kept) {
  if (kept) return {{256, 0, 256}, {256, 0, 256}, {2, 0}, {4, 0, 256}, {4, 0, 256}};
  std::uint32_t fill;
  std::memcpy(&fill, &kFill, sizeof fill);
  return {{4, 0}, {4, fill}};
}

/// All state, by copies or by the views that state in host memory has.
inline Outcome read_all(Engine& engine, bool views = false) {
  Outcome outcome;
  for (int g = 0; g < static_cast<int>(kGroups.size()); ++g) {
    for (std::size_t i = 0; i < kGroups[g].size(); ++i) {
      const auto count = kGroups[g][i];
      for (int s = 0; s < static_cast<int>(engine.streams().size()); ++s) {
        const auto bytes = static_cast<std::size_t>(engine.streams()[s].bytes(count));
        std::vector<float> values((bytes + sizeof(float) - 1) / sizeof(float));
        const auto item = static_cast<std::int64_t>(i);
        std::shared_ptr<hift::Slab> owner;
        const std::byte* view = views ? engine.address(g, item, s, &owner) : nullptr;
        if (view != nullptr) {
          if (count > 0) std::memcpy(values.data(), view, bytes);
        } else {
          engine.read(g, item, s, 0, count, reinterpret_cast<std::byte*>(values.data()));
        }
        (s == 0 ? outcome.first : outcome.second).push_back(std::move(values));
      }
    }
  }
  return outcome;
}

inline void set_kept(EngineOptions& options) {
  options.state_type = hift::StateType::kCode8;
  options.states = 2;
  options.master = true;
}

/// The training on the host up to `steps` steps.
inline const Outcome& expected(int steps = kSteps, bool kept = false) {
  static std::map<std::pair<int, bool>, Outcome> known;
  if (const auto found = known.find({steps, kept}); found != known.end()) return found->second;
  const Data& data = Data::get();
  auto params = data.params;
  EngineOptions options;
  options.page_bytes = 1 << 20;
  if (kept) {
    set_kept(options);
    for (auto& group : params) {
      for (auto& values : group) values = halved(values);
    }
  }
  Engine engine(streams(kept), options);
  engine.add_groups(kGroups);
  for (int s = 0; s < steps; ++s) {
    if (s == kLoaded) {
      engine.write(0, 3, 0, 0, kGroups[0][3],
                   reinterpret_cast<const std::byte*>(data.loaded.data()));
    }
    std::vector<Update> updates;
    for (std::size_t i = 0; i < kGroups[s % 3].size(); ++i) {
      Update u;
      u.item = static_cast<std::int64_t>(i);
      u.param = params[s % 3][i].data();
      u.grad = data.grads[s][i].data();
      set_hyper(u, s, kept);
      updates.push_back(u);
    }
    const float overflow = s == kSkipped ? 1.0f : 0.0f;
    engine.step(s % 3, updates, {nullptr, nullptr, &overflow}, 1, (s + 1) % 3, nullptr, kept);
  }
  Outcome outcome = read_all(engine);
  for (const auto& group : params) {
    outcome.params.insert(outcome.params.end(), group.begin(), group.end());
  }
  return known[{steps, kept}] = outcome;
}

/// Memory on the device, filled by an operation on a stream.
class DeviceBuffer {
 public:
  DeviceBuffer(std::size_t bytes, int device) : bytes_(bytes) {
    const hift::cuda::DeviceGuard guard(device);
    void* address = nullptr;
    hift::cuda::check(cudaMalloc(&address, bytes < 4 ? 4 : bytes), "cudaMalloc");
    address_ = address;
  }
  ~DeviceBuffer() {
    if (address_ != nullptr) cudaFree(address_);
  }
  DeviceBuffer(DeviceBuffer&& other) noexcept
      : address_(std::exchange(other.address_, nullptr)), bytes_(other.bytes_) {}
  DeviceBuffer& operator=(DeviceBuffer&&) = delete;
  float* data() const { return static_cast<float*>(address_); }
  std::size_t bytes() const { return bytes_; }

 private:
  void* address_ = nullptr;
  std::size_t bytes_;
};

/// The legacy default stream, or one that waits for it as torch's side streams do.
class ComputeStream {
 public:
  ComputeStream() = default;
  ~ComputeStream() {
    if (handle_ != nullptr) cudaStreamDestroy(handle_);
  }
  ComputeStream(const ComputeStream&) = delete;
  ComputeStream& operator=(const ComputeStream&) = delete;
  void create() {
    hift::cuda::check(cudaStreamCreateWithFlags(&handle_, cudaStreamDefault),
                      "cudaStreamCreateWithFlags");
  }
  operator cudaStream_t() const { return handle_; }

 private:
  cudaStream_t handle_ = nullptr;
};

struct Setting {
  std::string store = "ram";
  std::int64_t page_bytes = 4096;
  std::int64_t staging = EngineOptions::kWholeGroup;
  bool legacy_stream = false;  // steps on the default stream; otherwise on a blocking one
  int device = 1;              // not the current one
  bool kept = false;           // 16-bit weights with split masters, state in 8 bits, at random
};

/// The training on the simulated device.
class Training {
 public:
  explicit Training(const Setting& setting) : setting_(setting) {
    const Data& data = Data::get();
    const hift::cuda::DeviceGuard guard(setting.device);
    if (!setting.legacy_stream) stream_.create();
    overflow_.emplace_back(sizeof(float), setting.device);
    for (const auto& group : data.params) {
      params_.emplace_back();
      grads_.emplace_back();
      for (const auto& values : group) {
        const auto start = setting.kept ? halved(values) : values;
        params_.back().emplace_back(start.size() * sizeof(float), setting.device);
        grads_.back().emplace_back(values.size() * sizeof(float), setting.device);
        fill(params_.back().back(), start);
      }
    }
    EngineOptions options;
    options.store = setting.store;
    options.page_bytes = setting.page_bytes;
    options.staging = setting.staging;
    if (setting.kept) set_kept(options);
    engine_ = std::make_unique<Engine>(
        streams(setting.kept), options,
        hift::make_cuda_compute(setting.device, [this](std::int64_t bytes) {
          // torch gives what is freed to the next tensor, behind the work on its stream.
          if (!ring_.empty()) {
            fill(ring_.back(), std::vector<float>(ring_.back().bytes() / sizeof(float), kGarbage));
          }
          ring_.emplace_back(static_cast<std::size_t>(bytes), setting_.device);
          return ring_.back().data();
        }));
    engine_->add_groups({kGroups[0], kGroups[1]});
  }

  ~Training() {
    fail_call(-1);  // an end that CUDA refuses is the end of the process
    engine_.reset();
    const hift::cuda::DeviceGuard guard(setting_.device);
    cudaStreamSynchronize(stream_);  // what the test itself queued
  }

  void step(int s) {
    const Data& data = Data::get();
    if (s == kAdded && !added_) {
      engine_->add_groups({kGroups[2]});
      added_ = true;
    }
    if (s == kLoaded && !loaded_) {
      engine_->write(0, 3, 0, 0, kGroups[0][3],
                     reinterpret_cast<const std::byte*>(data.loaded.data()));
      loaded_ = true;
    }
    if (computed_ < s) {
      // The step's forward and backward.
      for (std::size_t i = 0; i < kGroups[s % 3].size(); ++i) {
        fill(grads_[s % 3][i], data.grads[s][i]);
      }
      fill(overflow_.front(), {s == kSkipped ? 1.0f : 0.0f});
      computed_ = s;
    }
    std::vector<Update> updates;
    for (std::size_t i = 0; i < kGroups[s % 3].size(); ++i) {
      Update u;
      u.item = static_cast<std::int64_t>(i);
      u.param = params_[s % 3][i].data();
      u.grad = grads_[s % 3][i].data();
      set_hyper(u, s, setting_.kept);
      updates.push_back(u);
    }
    const int next = added_ || (s + 1) % 3 != 2 ? (s + 1) % 3 : -1;
    engine_->step(s % 3, updates, {nullptr, nullptr, overflow_.front().data()}, 1, next, stream_,
                  setting_.kept);
  }

  Outcome outcome(bool views = false) {
    if (!added_) engine_->add_groups({kGroups[2]});
    added_ = true;
    Outcome outcome = read_all(*engine_, views);
    fail_call(-1);  // what follows is the test's own
    const hift::cuda::DeviceGuard guard(setting_.device);
    hift::cuda::check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
    for (const auto& group : params_) {
      for (const DeviceBuffer& p : group) {
        outcome.params.emplace_back(p.bytes() / sizeof(float));
        float* to = outcome.params.back().data();
        hift::cuda::check(enqueue(
                              stream_,
                              [to, &p] {
                                if (p.bytes() > 0) std::memcpy(to, p.data(), p.bytes());
                              },
                              "reading parameters"),
                          "enqueue");
        hift::cuda::check(cudaStreamSynchronize(stream_), "cudaStreamSynchronize");
      }
    }
    return outcome;
  }

  Engine& engine() { return *engine_; }

 private:
  void fill(const DeviceBuffer& buffer, const std::vector<float>& values) {
    const hift::cuda::DeviceGuard guard(setting_.device);
    float* to = buffer.data();
    hift::cuda::check(enqueue(
                          stream_,
                          [to, values] {
                            if (!values.empty())
                              std::memcpy(to, values.data(), values.size() * sizeof(float));
                          },
                          "backward"),
                      "enqueue");
  }

  Setting setting_;
  ComputeStream stream_;
  std::vector<std::vector<DeviceBuffer>> params_, grads_;
  std::vector<DeviceBuffer> overflow_, ring_;
  std::unique_ptr<Engine> engine_;
  int computed_ = -1;
  bool loaded_ = false, added_ = false;
};

/// Settings that differ in where pages are and how they are cut. A page of 4096 bytes is smaller
/// than most parameters, one of 32 KiB larger than all.
inline std::vector<Setting> settings(const std::string& store) {
  std::vector<Setting> all;
  for (const std::int64_t page : {4096, 32768}) {
    for (const std::int64_t slots : {0, 2, 3, -1}) {
      if (slots == 0 && store != "ram") continue;
      Setting s;
      s.store = store;
      s.page_bytes = page;
      s.staging = slots < 0 ? EngineOptions::kWholeGroup : slots * page;
      s.legacy_stream = slots == 3;
      all.push_back(s);
    }
  }
  return all;
}

}  // namespace hift_sim
