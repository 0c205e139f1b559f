// SPDX-License-Identifier: Apache-2.0
// Numbers in fewer bits: codes, halves of masters and random rounding by what they promise, and the
// host's passes against each other, to the bit.
#include <algorithm>
#include <array>
#include <cfloat>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>
#include <vector>

#include "check.h"
#include "cpu/codes.h"
#include "ways.h"

namespace {

using namespace hift;
using namespace hift::generic;
using namespace hift_test;

constexpr float kInf = std::numeric_limits<float>::infinity();

/// A float with random bits: any exponent, no NaN.
float any_float() {
  for (;;) {
    const float x = float_of(static_cast<std::uint32_t>(generator()));
    if (x == x) return x;
  }
}

template <bool kSigned>
void check_codes() {
  using Code = Code8<kSigned>;
  const int most = Code::kExponents << 3;
  CHECK(Code::decode(0) == 0.0f && Code::decode(most) == 1.0f, most);
  for (int code = 1; code <= most; ++code) {
    const double value = std::ldexp(1.0 + code % 8 / 8.0, code / 8 - Code::kExponents);
    CHECK(Code::decode(code) == value, code);
    CHECK(Code::encode(Code::decode(code)) == static_cast<std::uint32_t>(code), code);
    if (kSigned) CHECK(Code::decode(code | 0x80) == -value, code);
  }
  // The places of codes: that of 0 is where the smallest share would be.
  std::vector<double> place(most + 1);
  for (int code = 0; code <= most; ++code)
    place[code] = std::ldexp(1.0 + code % 8 / 8.0, code / 8 - Code::kExponents);
  for (int i = 0; i < 200000; ++i) {
    const float share = std::exp2(uniform(-Code::kExponents - 3.0f, 0.0f));
    const std::uint32_t code = Code::encode(share);
    const double error = std::abs(share - place[code]);
    const double below = code == 0 ? 1 : std::abs(share - place[code - 1]);
    const double above = static_cast<int>(code) == most ? 1 : std::abs(share - place[code + 1]);
    CHECK(error < below && error <= above, share, " is kept as ", code);
    if (kSigned) CHECK(Code::encode(-share) == (code | 0x80), share);
    // At random one of the two around it.
    const auto random = static_cast<std::uint32_t>(generator());
    const int drawn = static_cast<int>(Code::encode_stochastic(share, random));
    CHECK(share < place[0] ? drawn <= 1
                           : place[drawn] == share ||
                                 std::abs(share - place[drawn]) < place[std::min(drawn + 1, most)] -
                                                                      place[std::max(drawn - 1, 0)],
          share, " is drawn as ", drawn);
  }
  CHECK(Code::encode(2.0f) == static_cast<std::uint32_t>(most));
  CHECK(Code::encode(kInf) == static_cast<std::uint32_t>(most));
}

TEST(each_share_has_the_nearest_code) {
  check_codes<true>();
  check_codes<false>();
}

TEST(what_was_decoded_is_encoded_as_it_was) {
  for (const bool is_signed : {true, false}) {
    for (int round = 0; round < 400; ++round) {
      const std::int64_t count = 1 + generator() % 700, blocks = (count + 255) / 256;
      std::vector<float> values(count), again(count);
      std::vector<std::uint8_t> codes(blocks * kBlock), codes2(codes);
      std::vector<float> scales(blocks), scales2(blocks);
      const float size = std::exp2(uniform(-80.0f, 120.0f));
      for (float& x : values) x = std::exp2(uniform(-12.0f, 0.0f)) * size;
      for (float& x : values) x = is_signed && generator() % 2 == 0 ? -x : x;
      cpu::encode(values.data(), count, is_signed, codes.data(), scales.data());
      cpu::decode(codes.data(), scales.data(), count, is_signed, again.data());
      for (std::int64_t i = 0; i < count; ++i) {
        CHECK(std::abs(again[i] - values[i]) <= std::abs(values[i]) / 15, values[i], " of ",
              scales[i / 256], " is ", again[i]);
      }
      cpu::encode(again.data(), count, is_signed, codes2.data(), scales2.data());
      CHECK(codes == codes2 && scales == scales2, count, " values of about ", size);
    }
  }
}

TEST(blocks_that_are_zero_tiny_or_spoilt) {
  std::uint8_t codes[256];
  float scale, values[256], again[256];
  const auto keep = [&](float first, float others) {
    std::fill(values, values + 256, others);
    values[7] = first;
    cpu::encode(values, 256, true, codes, &scale);
    cpu::decode(codes, &scale, 256, true, again);
  };
  keep(0.0f, 0.0f);
  CHECK(scale == 0.0f && again[7] == 0.0f && again[0] == 0.0f);
  keep(std::nextafter(kLeastScale, 0.0f), 0.0f);
  CHECK(scale == 0.0f && again[7] == 0.0f, "below the least scale");
  keep(-kLeastScale, kLeastScale / 2);
  CHECK(scale == kLeastScale && again[7] == -kLeastScale && again[0] == kLeastScale / 2);
  keep(FLT_MAX, FLT_MAX / 4);
  CHECK(again[7] == FLT_MAX && again[0] <= FLT_MAX / 3.5f && again[0] >= FLT_MAX / 4.5f, again[0]);
  keep(kInf, 1.0f);
  CHECK(std::isinf(scale) && !std::isfinite(again[7]), again[7]);
  keep(-std::nanf(""), 1.0f);
  CHECK(std::isnan(scale) && std::isnan(again[0]) && std::isnan(again[7]));
}

TEST(the_largest_share_is_never_below_one) {
  for (int i = 0; i < 200000; ++i) {
    const float scale = scale_of(bits_of(any_float()) & 0x7fffffffu);
    if (scale == 0.0f || scale > 0x1p125f) continue;
    const float share = scale * shares_per(scale);
    CHECK(share >= 1.0f && share < 1.000001f, scale, ": ", share);
    CHECK(Code8<false>::encode_stochastic(share, 0) == 31 << 3, scale);
  }
  CHECK(shares_per(0.0f) == 0.0f && shares_per(kInf) == 0.0f);
}

TEST(a_master_is_its_weight_and_the_rest) {
  std::vector<float> values{0.0f, -0.0f, 1.0f, FLT_MAX, -FLT_MAX, FLT_MIN, kInf, -kInf, 1e-45f};
  for (int i = 0; i < 400000; ++i) values.push_back(any_float());
  for (std::uint32_t weight = 0; weight < 0x10000; weight += 3) {  // ties and their neighbours
    for (const std::uint32_t low : {0x7fffu, 0x8000u, 0x8001u})
      values.push_back(float_of(weight << 16 | low));
  }
  for (const float x : values) {
    if (x != x) continue;
    const float master = settled(x);
    BFloat16 weight, plain;
    store(weight, master);
    store(plain, x);
    CHECK(weight.bits == plain.bits, x, " settles as another weight");
    CHECK(bits_of(x) - bits_of(master) <= 1 && settled(master) == master, x);
    const std::int16_t low = low_of(master, weight);
    CHECK(bits_of(join(weight, low)) == bits_of(master), x, " is not its halves");
  }
  BFloat16 weight;
  store(weight, std::nanf(""));
  CHECK(low_of(std::nanf(""), weight) == 0 && std::isnan(join(weight, 0)));
}

// Random rounding ---------------------------------------------------------------------------------

constexpr int kDraws = 100000;

double mean_of(const std::vector<float>& values) {
  double sum = 0;
  for (const float x : values) sum += x;
  return sum / static_cast<double>(values.size());
}

TEST(weights_and_state_are_right_in_the_mean) {
  const int rule = cpu::rule_number("momentum");
  for (const std::uint64_t key : {visit_key(0, 0, 1), visit_key(7, 3, 1), visit_key(7, 3, 2)}) {
    for (const float g : {0.001f, -0.0317f, 0.4f, 3.3f}) {
      // p = 1 - 0.01 * buffer, buffer = 0.9 * 1 + g, both rounded at random.
      std::vector<BFloat16> param(kDraws, BFloat16{0x3f80}), buffer(param);
      const std::vector<float> grad(kDraws, g);
      Span s;
      s.param = param.data();
      s.grad = grad.data();
      s.state[0] = buffer.data();
      s.count = kDraws;
      s.rule = rule;
      const float hyper[] = {0.0f, 0.01f, 0.9f, 1.0f, 0.0f, 0.0f};
      std::copy(hyper, hyper + 6, s.hyper);
      s.param_dtype = DType::kBFloat16;
      s.state_type = StateType::kBFloat16;
      s.weights = Weights::kStochastic;
      s.stochastic_state = true;
      s.key = key;
      cpu::step(&s, 1, {}, 1);
      std::vector<float> p(kDraws), b(kDraws);
      double both = 0, var_p = 0, var_b = 0;
      const double exact_b = std::fma(1.0f, g, 0.9f * 1.0f), exact_p = 1.0 - 0.01f * exact_b;
      for (int i = 0; i < kDraws; ++i) {
        p[i] = load(param[i]), b[i] = load(buffer[i]);
        both += (p[i] - exact_p) * (b[i] - exact_b);
        var_p += (p[i] - exact_p) * (p[i] - exact_p);
        var_b += (b[i] - exact_b) * (b[i] - exact_b);
      }
      CHECK(std::abs(mean_of(p) - exact_p) < 3e-5 * std::abs(exact_p), g, ": ", mean_of(p));
      CHECK(std::abs(mean_of(b) - exact_b) < 3e-5 * std::abs(exact_b), g, ": ", mean_of(b));
      // The two draws know nothing of each other: five standard errors of a correlation.
      const double correlation = both / std::sqrt(var_p * var_b);
      CHECK(std::abs(correlation) < 5 / std::sqrt(kDraws), g, ": correlation ", correlation);
    }
  }
}

TEST(visits_draw_anew) {
  // The same element of the same parameter, visit after visit.
  for (const float x : {1.001f, 3.14159f, -0.7777f, 1e-20f}) {
    for (const std::uint32_t element : {0u, 12345u}) {
      std::vector<float> kept(kDraws);
      for (int visit = 0; visit < kDraws; ++visit) {
        const std::uint32_t random = random_bits(visit_key(1, 2, visit), 0, element);
        kept[visit] = float_of(stochastic_bits(x, random) & 0xffff0000u);
      }
      CHECK(std::abs(mean_of(kept) - x) < 3e-5 * std::abs(x), x, ": ", mean_of(kept));
    }
  }
  CHECK(float_of(stochastic_bits(kInf, 0xffff) & 0xffff0000u) == kInf);
  CHECK((stochastic_bits(-std::nanf(""), 0xffff) & 0xffff0000u) == 0x7fc00000u);
  // A code's steps are 2^-3 of the value, so that 100,000 tell to 1e-3.
  for (const float share : {0.9999f, 0.3f, 0.0101f, 0.5f}) {
    std::vector<float> kept(kDraws);
    for (int i = 0; i < kDraws; ++i) {
      const std::uint32_t code =
          Code8<false>::encode_stochastic(share, random_bits(visit_key(3, 0, 0), 1, i));
      kept[i] = Code8<false>::decode(code);
    }
    CHECK(std::abs(mean_of(kept) - share) < 1e-3 * share, share, ": ", mean_of(kept));
  }
}

// The passes against each other -------------------------------------------------------------------

/// The job's outcome, on so many threads, as one span or cut at multiples of 256.
Operands outcome(const Job& job, int threads, bool cut) {
  Operands operands = job.before;
  Span whole = job.span;
  operands.point(whole);
  std::vector<Span> spans{whole};
  while (cut && spans.back().count > kBlock) {
    Span rest = spans.back();
    const std::int64_t size = kBlock * (1 + generator() % 3);
    if (size >= rest.count) break;
    spans.back().count = size;
    const auto go_on = [&](auto*& at, std::int64_t bytes) {
      if (at != nullptr) at = reinterpret_cast<decltype(+at)>((std::uintptr_t)at + bytes);
    };
    go_on(rest.param, size * size_of(rest.param_dtype));
    go_on(rest.grad, size * size_of(rest.grad_dtype));
    go_on(rest.master, size * master_size(rest.weights));
    for (int i = 0; i < kMaxStates; ++i) {
      go_on(rest.state[i], size * size_of(rest.state_type));
      go_on(rest.scale[i], size / kBlock * 4);
    }
    rest.first += size;
    rest.count -= size;
    spans.push_back(rest);
  }
  cpu::step(spans.data(), spans.size(), {}, threads);
  return operands;
}

/// A job for each way of the rule: short ones, and where `threads` matters a long one.
std::vector<Job> jobs_of(const Way& way, std::int64_t longest) {
  const std::int64_t far = std::int64_t{1} << 32;
  std::vector<Job> jobs;
  for (const std::int64_t count :
       {std::int64_t{1}, std::int64_t{255}, std::int64_t{777}, longest}) {
    for (const std::int64_t first : {std::int64_t{0}, std::int64_t{301}, far - 400}) {
      const int odd = static_cast<int>(generator() % 2);
      jobs.push_back(make_job(way, count, first, {odd, odd, odd, odd}));
    }
  }
  return jobs;
}

TEST(instruction_sets_and_cuts_change_no_bit) {
  const std::string before = cpu::instruction_set();
  for (int rule = 0; rule < cpu::rule_count(); ++rule) {
    for (const Way& way : ways_of(rule)) {
      for (const Job& job : jobs_of(way, 1500)) {
        cpu::use_instruction_set("baseline");
        const Operands expected = outcome(job, 1, false);
        CHECK(same(expected, outcome(job, 1, true)), way.name(), ", cut");
        for (const std::string& set : cpu::instruction_sets()) {
          cpu::use_instruction_set(set);
          CHECK(same(expected, outcome(job, 1, false)), way.name(), ", on ", set);
        }
      }
    }
  }
  cpu::use_instruction_set(before);
}

TEST(threads_change_no_bit) {
  for (const char* name : {"adamw", "momentum"}) {
    for (const Way& way : ways_of(cpu::rule_number(name))) {
      if (way.param == DType::kFloat16 || way.grad == DType::kFloat32) continue;
      const Job job = make_job(way, 70000, 512, {});
      const Operands expected = outcome(job, 1, false);
      CHECK(same(expected, outcome(job, 3, false)), way.name(), ", three threads");
    }
  }
}

TEST(each_pass_has_the_bits_of_the_staged_one) {
  const auto check = [](const Job& job, UpdateRange update, const char* what, const Way& way) {
    const UpdateRange staged = cpu::rule(way.rule).staged;
    Operands expected = job.before, actual = job.before;
    Span span = job.span;
    expected.point(span);
    staged(span, 0, span.count, 0.7f);
    actual.point(span);
    update(span, 0, span.count, 0.7f);
    CHECK(same(expected, actual), way.name(), ", ", what, ", ", span.count, " elements");
  };
  int direct = 0, pairs = 0;
  for (int number = 0; number < cpu::rule_count(); ++number) {
    const RuleEntry& rule = cpu::rule(number);
    for (const Way& way : ways_of(number)) {
      const auto type = [](DType t) { return static_cast<int>(t); };
      const bool nearest = way.weights == Weights::kNearest;
      const bool all16 = way.param == DType::kBFloat16 && way.grad == DType::kBFloat16 &&
                         way.state == StateType::kBFloat16;
      const bool alike = way.stochastic_state ? way.weights == Weights::kStochastic : nearest;
      for (const Job& job : jobs_of(way, 1030)) {
        if (way.state == StateType::kFloat32 && nearest && ++direct)
          check(job, rule.update[type(way.param)][type(way.grad)], "direct", way);
        if (all16 && alike && ++pairs)
          check(job, rule.pairs[way.stochastic_state], "in pairs", way);
      }
    }
  }
  CHECK(direct > 100 && pairs > 100, direct, " ", pairs);
}

TEST(whole_and_split_masters_are_the_same_numbers) {
  // A NaN need not be the same one: with these numbers there is none.
  const std::vector<std::pair<const char*, std::array<float, 7>>> rules{
      {"adamw", {0.999f, 0.1f, 0.99f, 0.01f, 0.013f, 1.1f, 1e-6f}},
      {"adagrad", {0.01f, 0.013f, 1e-6f}},
      {"sgd", {0.01f, 0.013f}},
      {"momentum", {0.01f, 0.013f, 0.9f, 1.0f, 0.0f, 0.0f}}};
  for (const auto& [name, hyper] : rules) {
    const Way split{cpu::rule_number(name), DType::kBFloat16, DType::kBFloat16,
                    StateType::kFloat32,    Weights::kSplit,  false};
    Way whole = split;
    whole.weights = Weights::kMaster;
    Job a = make_job(split, 600, 0, {}), b = make_job(whole, 600, 0, {});
    b.before.all[0] = a.before.all[0];
    std::copy(hyper.begin(), hyper.end(), a.span.hyper);
    std::copy(hyper.begin(), hyper.end(), b.span.hyper);
    b.span.grad_factor = a.span.grad_factor;
    for (std::size_t i = 3; i < a.before.all.size(); ++i) b.before.all[i] = a.before.all[i];
    for (int i = 0; i < 600; ++i) {
      a.before.all[2].as<std::int16_t>()[i] = 0;
      b.before.all[2].as<float>()[i] = load(a.before.all[0].as<BFloat16>()[i]);
    }
    int moved = 0;
    for (int step = 0; step < 50; ++step) {
      for (int i = 0; i < 600; ++i) store(a.before.all[1].as<BFloat16>()[i], value());
      b.before.all[1] = a.before.all[1];
      a.before.point(a.span);
      b.before.point(b.span);
      cpu::step(&a.span, 1, {}, 1);
      cpu::step(&b.span, 1, {}, 1);
      CHECK(a.before.all[0] == b.before.all[0], name, ", weights of step ", step);
      for (int i = 0; i < 600; ++i) {
        const std::int16_t low = a.before.all[2].as<std::int16_t>()[i];
        const float master = join(a.before.all[0].as<BFloat16>()[i], low);
        CHECK(bits_of(master) == bits_of(b.before.all[2].as<float>()[i]), name, ", step ", step);
        moved += low != 0;
      }
    }
    CHECK(moved > 10000, name, ": ", moved);
  }
}

}  // namespace

int main(int argc, char** argv) { return hift_test::run_tests(argc, argv); }
