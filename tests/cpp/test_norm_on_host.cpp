// SPDX-License-Identifier: Apache-2.0
// The kernels of a norm, lanes in lockstep on the host, against the order that is promised: counts
// around rows and blocks, every misalignment, more gradients than a launch takes.
#include "host_kernel.h"

#include "cuda/norm.cu"

#include "check.h"
#include "norm_reference.h"

namespace {

using namespace hift_test;

constexpr int kStream = 0;

double sum(const std::vector<Gradient>& gradients) {
  std::int64_t blocks = 0;
  for (const Gradient& g : gradients) blocks += hift::norm_blocks(g.count);
  constexpr double kSentinel = -77.0;
  std::vector<double> sums(blocks + 1, kSentinel);
  double total = kSentinel;
  hift::cuda::launches.clear();
  hift::cuda::devices.clear();
  hift::cuda::sum_of_squares(gradients.data(), gradients.size(), sums.data(), &total, 3,
                             const_cast<int*>(&kStream));
  CHECK(sums.back() == kSentinel, "a sum beyond the last block's");
  CHECK(hift::cuda::devices == std::vector<int>{3});
  for (const hift::cuda::Launch& launch : hift::cuda::launches) {
    CHECK(launch.argument_bytes <= 4096 && launch.stream == &kStream);
  }
  return total;
}

void check_sum(const Grads& grads) {
  const double expected = reference({grads.get()}), found = sum({grads.get()});
  CHECK(same_bits(found, expected), grads.get().count, " elements of type ",
        static_cast<int>(grads.get().dtype), " at ", grads.get().data, ": ", found, " for ",
        expected);
}

TEST(counts_around_rows_and_blocks) {
  for (const DType type : kTypes) {
    const int step = type == DType::kFloat32 ? 1 : 5;
    for (int count = 0; count <= 260; count += step) check_sum(Grads(type, count, 0, count));
    for (const int near : {4096 - 128, 4096, 4096 + 128, 9 * 4096}) {
      for (int count = near - 1; count <= near + 1; ++count)
        check_sum(Grads(type, count, count % 3, count));
    }
  }
}

TEST(misaligned_gradients) {
  for (const DType type : kTypes) {
    for (int offset = 0; offset < 8; ++offset) check_sum(Grads(type, 4096 + 77, offset, offset));
  }
}

TEST(many_gradients_of_all_types) {
  std::vector<Grads> all;
  for (int i = 0; i < 400; ++i) {
    const int count = i % 9 == 0 ? 0 : i % 50 == 1 ? 9000 + i : 3 * i;
    all.emplace_back(kTypes[i % 3 == 1 ? i / 3 % 3 : 0], count, i % 5, i);
  }
  std::vector<Gradient> gradients;
  for (const Grads& grads : all) gradients.push_back(grads.get());
  CHECK(same_bits(sum(gradients), reference(gradients)));
  std::size_t floats = 0;
  for (const Gradient& g : gradients) floats += g.dtype == DType::kFloat32 && g.count > 0;
  constexpr std::size_t kCapacity = hift::cuda::NormTable<float>::kCapacity;
  CHECK(floats > kCapacity);
  // Tables of float, one each of bfloat16 and float16, and the total.
  const std::size_t expected = (floats + kCapacity - 1) / kCapacity + 3;
  CHECK(hift::cuda::launches.size() == expected, hift::cuda::launches.size(), " for ", expected);
  CHECK(sum({}) == 0.0);
}

TEST(a_nan_and_an_infinity_stay) {
  for (const float value : {std::nanf(""), -INFINITY}) {
    Grads grads(DType::kFloat32, 5000, 0, 1);
    grads.set(4500, value);
    check_sum(grads);
  }
}

TEST(norm_and_coefficient_are_the_hosts) {
  const float scale = 3.7f;
  for (const double total : {0.0, 1e-9, 2.0, 25.0, 1e12}) {
    for (const float* by : {static_cast<const float*>(nullptr), &scale}) {
      float found[2] = {-1, -1}, expected[2] = {-2, -2};
      hift::cuda::write_clip(&total, {by, 0.7f, &found[0], &found[1]}, 0, nullptr);
      hift::generic::write_norm(total, {by, 0.7f, &expected[0], &expected[1]});
      CHECK(found[0] == expected[0] && found[1] == expected[1], total);
    }
  }
}

TEST(what_has_no_norm_is_refused) {
  const Grads grads(DType::kFloat32, 8, 0, 0);
  Gradient g = grads.get();
  g.dtype = static_cast<DType>(7);
  CHECK_THROWS(std::invalid_argument, "type 7", sum({g}));
  g = grads.get();
  g.data = nullptr;
  CHECK_THROWS(std::invalid_argument, "null address", sum({g}));
  double total;
  CHECK_THROWS(std::invalid_argument, "null address",
               hift::cuda::sum_of_squares(&grads.get(), 1, nullptr, &total, 0, nullptr));
}

}  // namespace

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
