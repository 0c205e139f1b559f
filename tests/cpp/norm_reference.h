// SPDX-License-Identifier: Apache-2.0
// The order in which a norm is added up, written as core/norm.h says it and as plainly as can be;
// and gradients whose sums depend on that order.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <random>
#include <vector>

#include "core/norm.h"

namespace hift_test {

using hift::DType;
using hift::Gradient;

inline constexpr DType kTypes[] = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};

/// Room for `count` elements from `offset` elements after a 64-byte boundary on, filled at random.
class Grads {
 public:
  Grads(DType type, std::int64_t count, int offset, unsigned seed) : lines_(2 + (count + 64) / 16) {
    std::mt19937 random(seed);
    std::uniform_real_distribution<float> exponent(-4.0f, 2.0f);
    gradient_.dtype = type;
    gradient_.count = count;
    gradient_.data = reinterpret_cast<unsigned char*>(lines_.data()) + offset * hift::size_of(type);
    for (std::int64_t i = 0; i < count; ++i) {
      set(i, (random() % 2 == 0 ? 1.0f : -1.0f) * std::pow(10.0f, exponent(random)));
    }
  }

  void set(std::int64_t i, float value) {
    auto* at = const_cast<void*>(gradient_.data);
    if (gradient_.dtype == DType::kFloat32) {
      static_cast<float*>(at)[i] = value;
    } else if (gradient_.dtype == DType::kBFloat16) {
      hift::generic::store(static_cast<hift::generic::BFloat16*>(at)[i], value);
    } else {
      hift::generic::store(static_cast<hift::generic::Float16*>(at)[i], value);
    }
  }

  const Gradient& get() const { return gradient_; }

 private:
  struct alignas(64) Line {
    unsigned char bytes[64];
  };
  std::vector<Line> lines_;
  Gradient gradient_;
};

inline double element(const Gradient& g, std::int64_t i) {
  using namespace hift::generic;
  if (g.dtype == DType::kFloat32) return static_cast<const float*>(g.data)[i];
  if (g.dtype == DType::kBFloat16) return load(static_cast<const BFloat16*>(g.data)[i]);
  return load(static_cast<const Float16*>(g.data)[i]);
}

inline double block_sum(const Gradient& g, std::int64_t block) {
  double column[128] = {};
  for (int i = 0; i < 4096; ++i) {
    const std::int64_t at = block * 4096 + i;
    const double x = at < g.count ? element(g, at) : 0.0;
    column[i % 128] += x * x;
  }
  for (int half : {64, 32, 16, 8, 4, 2, 1}) {
    for (int c = 0; c < half; ++c) column[c] += column[c + half];
  }
  return column[0];
}

inline double reference(const std::vector<Gradient>& gradients) {
  double sum = 0.0;
  for (const Gradient& g : gradients) {
    for (std::int64_t block = 0; block * 4096 < g.count; ++block) sum += block_sum(g, block);
  }
  return sum;
}

inline bool same_bits(double a, double b) {
  return std::memcmp(&a, &b, sizeof a) == 0 || (std::isnan(a) && std::isnan(b));
}

}  // namespace hift_test
