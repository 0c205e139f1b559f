// SPDX-License-Identifier: Apache-2.0
// Every way of keeping a span's numbers that is offered, and random operands for it, with sentinels
// around each.
#pragma once

#include <array>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "buffer.h"
#include "core/precision.h"
#include "cpu/step.h"

namespace hift_test {

using namespace hift;
using namespace hift::generic;

inline std::mt19937 generator(20240116);

inline float uniform(float low, float high) {
  return std::uniform_real_distribution<float>(low, high)(generator);
}

template <class Choice>
auto pick(const Choice& from) {
  return from[generator() % from.size()];
}

/// How a span's numbers are kept.
struct Way {
  int rule;
  DType param, grad;
  StateType state;
  Weights weights;
  bool stochastic_state;

  bool coded() const { return state == StateType::kCode8 && cpu::rule(rule).states > 0; }
  std::string name() const {
    return text(cpu::rule(rule).name, ", parameter ", static_cast<int>(param), ", gradient ",
                static_cast<int>(grad), ", state ", static_cast<int>(state), ", weights ",
                static_cast<int>(weights), stochastic_state ? ", stochastic state" : "");
  }
};

inline std::vector<Way> ways_of(int rule) {
  const std::array<DType, 3> types{DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  std::vector<Way> all;
  for (const DType param : types) {
    for (const DType grad : {param, DType::kFloat32}) {
      if (param == DType::kFloat32 && all.size() > 0 && grad == all.back().grad) continue;
      for (int state = 0; state < kStateTypes; ++state) {
        const bool codes = static_cast<StateType>(state) == StateType::kCode8;
        if (codes && cpu::rule(rule).non_negative < 0 && cpu::rule(rule).states > 0) continue;
        for (const Weights weights :
             {Weights::kNearest, Weights::kStochastic, Weights::kMaster, Weights::kSplit}) {
          if (param == DType::kFloat32 && weights != Weights::kNearest) continue;
          if (param == DType::kFloat16 && weights != Weights::kNearest &&
              weights != Weights::kMaster)
            continue;
          for (const bool stochastic : {false, true})
            all.push_back({rule, param, grad, static_cast<StateType>(state), weights, stochastic});
        }
      }
    }
  }
  return all;
}

/// A span's operands: the parameter, the gradient, the master, the states, their scales.
struct Operands {
  std::vector<Buffer> all;

  void point(Span& span) {
    span.param = all[0].as<void>();
    span.grad = all[1].as<void>();
    span.master = master_size(span.weights) > 0 ? all[2].as<void>() : nullptr;
    for (int i = 0; i < cpu::rule(span.rule).states; ++i) {
      span.state[i] = all[3 + 2 * i].as<void>();
      span.scale[i] = all[4 + 2 * i].as<float>();
    }
  }
};

struct Job {
  Span span;
  Operands before, expected, actual;
};

inline void fill(Buffer& buffer, std::int64_t i, DType type, float x) {
  if (type == DType::kFloat32) store(buffer.as<float>()[i], x);
  if (type == DType::kBFloat16) store(buffer.as<BFloat16>()[i], x);
  if (type == DType::kFloat16) store(buffer.as<Float16>()[i], x);
}

inline float value() { return uniform(-1.0f, 1.0f) * std::pow(10.0f, uniform(-4.0f, 1.0f)); }

/// `offset`: of the operands from an aligned address, in values.
inline Job make_job(const Way& way, std::int64_t count, std::int64_t first,
                    std::array<int, 4> offset) {
  Job job;
  Span& s = job.span;
  s.count = count;
  s.rule = way.rule;
  s.param_dtype = way.param;
  s.grad_dtype = way.grad;
  s.state_type = way.state;
  s.weights = way.weights;
  s.stochastic_state = way.stochastic_state;
  s.key = (std::uint64_t{generator()} << 32) + generator();
  // Blocks of codes are counted from the item's first element.
  s.first = way.state == StateType::kCode8 ? first / kBlock * kBlock : first;
  s.shard = first - s.first;
  s.grad_factor = generator() % 2 == 0 ? 1.0f : -1.0f;
  for (float& h : s.hyper) {
    const auto kind = generator() % 4;  // switches are 0 or 1
    h = kind < 2 ? static_cast<float>(kind) : uniform(0.01f, 0.9f);
  }
  auto& all = job.before.all;
  const std::int64_t master = master_size(way.weights);
  all.emplace_back(count, offset[0], size_of(way.param));
  all.emplace_back(count, offset[1], size_of(way.grad));
  all.emplace_back(count, offset[2], master > 0 ? master : 1);
  for (std::int64_t i = 0; i < count; ++i) {
    const float p = value();
    fill(all[0], i, way.param, p);
    fill(all[1], i, way.grad, value());
    // Every fifth weight was set by somebody else and is not its master's rounding.
    if (master == 4) all[2].as<float>()[i] = i % 5 == 0 ? value() : p;
    if (master == 2) all[2].as<std::int16_t>()[i] = static_cast<std::int16_t>(generator());
  }
  const std::int64_t blocks = (count + kBlock - 1) / kBlock;
  for (int state = 0; state < cpu::rule(way.rule).states; ++state) {
    // Codes are whole blocks, and begin at a word.
    const std::int64_t values = way.coded() ? blocks * kBlock : count;
    all.emplace_back(values, way.coded() ? 4 * offset[3] : offset[3], size_of(way.state));
    all.emplace_back(blocks, offset[3], sizeof(float));
    Buffer &values_of = all[3 + 2 * state], &scales = all[4 + 2 * state];
    for (std::int64_t i = 0; i < values; ++i) {
      const float x = uniform(0.1f, 1.0f) * std::pow(10.0f, uniform(-4.0f, 1.0f));
      if (way.coded()) {
        values_of.as<std::uint8_t>()[i] = i < count ? generator() % 121 : 0;
      } else {
        fill(values_of, i, static_cast<DType>(way.state), x);
      }
    }
    for (std::int64_t b = 0; b < blocks; ++b) {
      scales.as<float>()[b] = generator() % 8 == 0 ? 0.0f : uniform(1e-6f, 2.0f);
    }
  }
  return job;
}

inline bool same(const Operands& a, const Operands& b) { return a.all == b.all; }

}  // namespace hift_test
