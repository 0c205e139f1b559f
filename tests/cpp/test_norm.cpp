// SPDX-License-Identifier: Apache-2.0
// The norm on the host has the bits of the order that is promised: every count through a block and
// beyond, misaligned addresses, every instruction set, every number of threads.
#include "cpu/norm.h"

#include <limits>

#include "check.h"
#include "cpu/step.h"
#include "norm_reference.h"

namespace {

using namespace hift_test;

double sum(const std::vector<Gradient>& gradients, int threads = 1) {
  return hift::cpu::sum_of_squares(gradients.data(), gradients.size(), threads);
}

template <class Body>
void on_each_instruction_set(const Body& body) {
  const std::string before = hift::cpu::instruction_set();
  for (const std::string& name : hift::cpu::instruction_sets()) {
    hift::cpu::use_instruction_set(name);
    body(name);
  }
  hift::cpu::use_instruction_set(before);
}

TEST(every_count_through_a_block_and_beyond) {
  for (const DType type : kTypes) {
    for (int count = 0; count <= 4096 + 150; ++count) {
      const Grads grads(type, count, count % 16, count);
      const double expected = reference({grads.get()});
      on_each_instruction_set([&](const std::string& name) {
        const double found = sum({grads.get()});
        CHECK(same_bits(found, expected), count, " elements of type ", static_cast<int>(type),
              " on ", name, ": ", found, " for ", expected);
      });
    }
  }
}

TEST(the_order_shows_in_the_bits) {
  const Grads grads(DType::kFloat32, 4096, 0, 1);
  double in_a_row = 0.0;
  for (int i = 0; i < 4096; ++i) in_a_row += element(grads.get(), i) * element(grads.get(), i);
  CHECK(!same_bits(in_a_row, reference({grads.get()})));
}

TEST(misaligned_gradients) {
  for (const DType type : kTypes) {
    for (int offset = 0; offset < 32; ++offset) {
      const Grads grads(type, 2 * 4096 + 131, offset, offset);
      const double expected = reference({grads.get()});
      on_each_instruction_set([&](const std::string& name) {
        CHECK(same_bits(sum({grads.get()}), expected), "offset ", offset, " on ", name);
      });
    }
  }
}

TEST(many_gradients_on_any_number_of_threads) {
  std::vector<Grads> all;
  for (int i = 0; i < 90; ++i) {
    const int count = i % 9 == 0 ? 0 : i % 7 == 0 ? 9 * 4096 + i : 61 * i;
    all.emplace_back(kTypes[i % 3], count, i % 5, i);
  }
  std::vector<Gradient> gradients;
  for (const Grads& grads : all) gradients.push_back(grads.get());
  const double expected = reference(gradients);
  on_each_instruction_set([&](const std::string& name) {
    for (const int threads : {1, 2, 3, 5}) {
      for (int again = 0; again < 10; ++again)
        CHECK(same_bits(sum(gradients, threads), expected), threads, " threads, ", name);
    }
  });
  std::swap(gradients.front(), gradients[44]);
  CHECK(!same_bits(sum(gradients), expected), "the gradients' order does not show");
}

TEST(extreme_values) {
  const float inf = std::numeric_limits<float>::infinity();
  const float huge = std::numeric_limits<float>::max();
  const float tiny = std::numeric_limits<float>::denorm_min();
  for (const float value : {inf, -inf, std::nanf(""), huge, tiny}) {
    for (const int at : {0, 127, 128, 4095, 4096, 4299}) {
      Grads grads(DType::kFloat32, 4300, 1, 7);
      grads.set(at, value);
      const double expected = reference({grads.get()});
      CHECK(std::isnan(value) ? std::isnan(expected) : std::isinf(value) == std::isinf(expected));
      on_each_instruction_set([&](const std::string& name) {
        CHECK(same_bits(sum({grads.get()}), expected), value, " at ", at, " on ", name);
      });
    }
  }
  Grads small(DType::kFloat32, 3, 0, 7);
  for (int i = 0; i < 3; ++i) small.set(i, tiny);
  CHECK(sum({small.get()}) == 3 * std::pow(2.0, -298), "squares of subnormal floats are kept");
}

TEST(norm_and_coefficient) {
  float norm = -1.0f, coefficient = -1.0f;
  const auto clip = [&](double sum_of_squares, float limit, const float* scale) {
    hift::cpu::write_clip(sum_of_squares, {scale, limit, &norm, &coefficient});
  };
  clip(25.0, 1.0f, nullptr);
  CHECK(norm == 5.0f && coefficient == static_cast<float>(1.0 / (5.0 + 1e-6)), coefficient);
  clip(25.0, 100.0f, nullptr);
  CHECK(norm == 5.0f && coefficient == 1.0f, coefficient);
  const float scale = 4.0f;
  clip(25.0, 1.0f, &scale);
  CHECK(norm == 1.25f && coefficient == static_cast<float>(1.0 / (1.25 + 1e-6)), coefficient);
  clip(std::numeric_limits<double>::infinity(), 1.0f, nullptr);
  CHECK(std::isinf(norm) && coefficient == 0.0f, coefficient);
  clip(std::nan(""), 1.0f, nullptr);
  CHECK(std::isnan(norm) && std::isnan(coefficient), coefficient);
  clip(0.0, 1.0f, nullptr);
  CHECK(norm == 0.0f && coefficient == 1.0f, coefficient);
}

TEST(what_has_no_norm_is_refused) {
  const Grads grads(DType::kFloat32, 8, 0, 0);
  Gradient g = grads.get();
  g.dtype = static_cast<DType>(7);
  CHECK_THROWS(std::invalid_argument, "type 7", sum({g}));
  g = grads.get();
  g.count = -1;
  CHECK_THROWS(std::invalid_argument, "-1", sum({g}));
  g = grads.get();
  g.data = nullptr;
  CHECK_THROWS(std::invalid_argument, "null address", sum({g}));
  CHECK_THROWS(std::invalid_argument, "threads", sum({grads.get()}, 0));
  CHECK(sum({}) == 0.0);
}

}  // namespace

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
