// SPDX-License-Identifier: Apache-2.0
// Loops whose operands end where memory ends: nothing past them is read, and asking for what is
// not there, as the loops do ahead of their work, is nobody's error.
#include <sys/mman.h>
#include <unistd.h>

#include <cerrno>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/norm.h"
#include "ways.h"

namespace {

using namespace hift_test;

/// A copy of a buffer's elements, their last byte the last one before a page that nobody may touch.
class Guarded {
 public:
  explicit Guarded(Buffer& from) : bytes_(from.bytes()) {
    const auto page = static_cast<std::size_t>(::sysconf(_SC_PAGESIZE));
    const std::size_t readable = (bytes_ + page - 1) / page * page;
    mapped_ = readable + page;
    void* mapped =
        ::mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (mapped == MAP_FAILED) throw_errno(errno, "cannot map ", mapped_, " bytes");
    start_ = static_cast<std::byte*>(mapped);
    if (::mprotect(start_ + readable, page, PROT_NONE) != 0) throw_errno(errno, "no guard page");
    data_ = start_ + readable - bytes_;
    if (bytes_ > 0) std::memcpy(data_, from.as<void>(), bytes_);
  }
  Guarded(const Guarded&) = delete;
  Guarded& operator=(const Guarded&) = delete;
  ~Guarded() { ::munmap(start_, mapped_); }

  template <class T>
  T* as() {
    return reinterpret_cast<T*>(data_);
  }
  bool holds(Buffer& expected) const {
    return bytes_ == 0 || std::memcmp(data_, expected.as<void>(), bytes_) == 0;
  }

 private:
  std::size_t bytes_, mapped_;
  std::byte* start_;
  std::byte* data_;
};

const std::vector<std::int64_t> kCounts{1, 63, 64, 65, 127, 129, 255, 257, 640, 1030};

void updates_end_with_their_operands(const std::string& set) {
  for (int rule = 0; rule < cpu::rule_count(); ++rule) {
    for (const Way& way : ways_of(rule)) {
      for (const std::int64_t count : kCounts) {
        Job job = make_job(way, count, 0, {});
        std::vector<std::unique_ptr<Guarded>> guarded;
        for (Buffer& buffer : job.before.all) guarded.push_back(std::make_unique<Guarded>(buffer));
        Span span = job.span;
        job.before.point(span);
        cpu::step(&span, 1, {}, 1);

        span.param = guarded[0]->as<void>();
        span.grad = guarded[1]->as<void>();
        if (span.master != nullptr) span.master = guarded[2]->as<void>();
        for (int i = 0; i < cpu::rule(rule).states; ++i) {
          span.state[i] = guarded[3 + 2 * i]->as<void>();
          span.scale[i] = guarded[4 + 2 * i]->as<float>();
        }
        cpu::step(&span, 1, {}, 1);
        for (std::size_t i = 0; i < guarded.size(); ++i) {
          CHECK(guarded[i]->holds(job.before.all[i]), set, ", ", way.name(), ", ", count,
                " elements, operand ", i);
        }
      }
    }
  }
}

void norms_end_with_their_gradients(const std::string& set) {
  for (const DType type : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
    for (const std::int64_t count : {1, 127, 128, 129, 4096, 5000}) {
      Buffer values(count, 0, size_of(type));
      for (std::int64_t i = 0; i < count; ++i) fill(values, i, type, value());
      Guarded guarded(values);
      const Gradient free{values.as<void>(), count, type};
      const Gradient last{guarded.as<void>(), count, type};
      CHECK(cpu::sum_of_squares(&free, 1, 1) == cpu::sum_of_squares(&last, 1, 1), set, ", type ",
            static_cast<int>(type), ", ", count, " elements");
    }
  }
}

TEST(nothing_past_the_operands_is_touched) {
  const std::string before = cpu::instruction_set();
  for (const std::string& set : cpu::instruction_sets()) {
    cpu::use_instruction_set(set);
    updates_end_with_their_operands(set);
    norms_end_with_their_gradients(set);
  }
  cpu::use_instruction_set(before);
}

}  // namespace

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
