// SPDX-License-Identifier: Apache-2.0
// Conversions of binary16 by the processor's own instructions, where an instruction set has them:
// for every number the bits of core/dtype.h.
#include <cmath>
#include <string>
#include <vector>

#include "check.h"
#include "core/dtype.h"
#include "cpu/step.h"

namespace {

using namespace hift;
using namespace hift::generic;

/// Until its end subnormal floats are zeros, as under torch.set_flush_denormal(True).
class Flushed {
 public:
  explicit Flushed(bool on) {
#if defined(__SSE__)
    if (on) __builtin_ia32_ldmxcsr(before_ | 0x8040u);
#else
    (void)on;
#endif
  }
  ~Flushed() {
#if defined(__SSE__)
    __builtin_ia32_ldmxcsr(before_);
#endif
  }
  Flushed(const Flushed&) = delete;
  Flushed& operator=(const Flushed&) = delete;

 private:
#if defined(__SSE__)
  unsigned before_ = __builtin_ia32_stmxcsr();
#endif
};

/// Every binary16 and, for each upper half of a float, the lower ones around which roundings turn,
/// through each instruction set's own conversions; `store` and `load` say what is right.
void convert_halves_alike(bool flush) {
  std::vector<float> grads;
  for (std::uint32_t high = 0; high < 0x10000; ++high) {
    for (const std::uint32_t low : {0u, 1u, 0xfffu, 0x1000u, 0x1001u, 0x2fffu, 0x3000u, 0x3001u,
                                    0x7fffu, 0x8000u, 0x8001u, 0xffffu})
      grads.push_back(float_of(high << 16 | low));
  }
  std::vector<Float16> halves(0x10000 + 3);
  for (std::uint32_t i = 0; i < halves.size(); ++i) halves[i].bits = i;
  std::vector<std::uint32_t> widened(halves.size());
  const volatile float one = 1.0f;  // times which a signalling NaN is quiet
  for (std::size_t i = 0; i < halves.size(); ++i) widened[i] = bits_of(load(halves[i]) * one);
  // Subnormal halves are normal floats: nothing flushes them.
  const Flushed flushed(flush);
  const std::string before = cpu::instruction_set();
  for (const std::string& set : cpu::instruction_sets()) {
    cpu::use_instruction_set(set);
    std::vector<Float16> weights(grads.size(), Float16{0});
    Span s;
    s.param = weights.data();
    s.grad = grads.data();
    s.count = static_cast<std::int64_t>(grads.size());
    s.rule = cpu::rule_number("sgd");
    s.hyper[1] = -1.0f;  // p = g
    s.param_dtype = DType::kFloat16;
    cpu::step(&s, 1, {}, 1);
    for (std::size_t i = 0; i < grads.size(); ++i) {
      Float16 expected;
      store(expected, std::fma(1.0f, grads[i], 0.0f));
      CHECK(weights[i].bits == expected.bits, set, ": ", grads[i], " is ", weights[i].bits);
    }
    std::vector<float> buffer(halves.size());
    weights.assign(halves.size(), Float16{0});
    s.param = weights.data();
    s.grad = halves.data();
    s.state[0] = buffer.data();
    s.count = static_cast<std::int64_t>(halves.size());
    s.rule = cpu::rule_number("momentum");
    s.hyper[1] = 0.0f;
    s.hyper[5] = 1.0f;  // the buffer is the gradient
    s.grad_dtype = DType::kFloat16;
    cpu::step(&s, 1, {}, 1);
    for (std::size_t i = 0; i < halves.size(); ++i) {
      CHECK(bits_of(buffer[i]) == widened[i], set, ": ", halves[i].bits);
    }
  }
  cpu::use_instruction_set(before);
}

TEST(instruction_sets_convert_halves_alike) { convert_halves_alike(false); }
TEST(flushing_subnormal_floats_leaves_halves_alone) { convert_halves_alike(true); }

}  // namespace

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
