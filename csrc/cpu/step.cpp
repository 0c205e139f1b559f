// SPDX-License-Identifier: Apache-2.0
// Chooses the instruction set once, checks every span, and splits the elements evenly over threads:
// a range may begin and end inside a span, since elements do not know their neighbours.
#include "cpu/step.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>

#include "core/check.h"
#include "core/kept.h"
#include "cpu/pool.h"
#include "cpu/table.h"
#include "rules/all.h"

namespace hift::cpu {
namespace {

// Below this many elements a thread's wake-up costs more than the work it takes over.
constexpr std::int64_t kMinElementsPerThread = 32768;

/// Elements that a thread takes at a time: about 32 turns each, so that one which the system holds
/// up delays the others little, and long enough for the processor's prefetching. A multiple of 64,
/// so that two threads never write one cache line of a float stream.
std::int64_t grain_of(std::int64_t total, int threads) {
  const std::int64_t share = total / (std::int64_t{32} * threads);
  return std::clamp<std::int64_t>(share, 1 << 14, 1 << 18) / 64 * 64;
}

std::int64_t whole_blocks(std::int64_t elements) {
  return (elements + generic::kBlock - 1) / generic::kBlock * generic::kBlock;
}

std::vector<InstructionSet> available() {
  std::vector<InstructionSet> sets{{"baseline", baseline::table(), baseline::square_sums()}};
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
      __builtin_cpu_supports("f16c")) {
    sets.push_back({"avx2", avx2::table(), avx2::square_sums()});
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      sets.push_back({"avx512", avx512::table(), avx512::square_sums()});
    }
  }
#endif
  return sets;
}

const InstructionSet& find(const std::string& name) {
  static const std::vector<InstructionSet> sets = available();
  if (name.empty()) return sets.back();
  std::string offered;
  for (const InstructionSet& set : sets) {
    if (name == set.name) return set;
    offered += text(offered.empty() ? "" : ", ", set.name);
  }
  throw std::invalid_argument(text("instruction set '", name,
                                   "' is not offered on this processor; offered are: ", offered));
}

std::atomic<const InstructionSet*>& current() {
  static std::atomic<const InstructionSet*> set = [] {
    const char* wish = std::getenv("HIFT_ISA");
    return &find(wish == nullptr ? "" : wish);
  }();
  return set;
}

/// The loop for a span whose pair of types is offered.
UpdateRange loop_of(const RuleEntry& rule, const Span& s, UpdateRange direct) {
  const bool plain = s.state_type == StateType::kFloat32 || rule.states == 0;
  if (plain && s.weights == Weights::kNearest) return direct;
  const bool all16 = s.state_type == StateType::kBFloat16 && s.param_dtype == DType::kBFloat16 &&
                     s.grad_dtype == DType::kBFloat16;
  const Weights alike = s.stochastic_state ? Weights::kStochastic : Weights::kNearest;
  return all16 && s.weights == alike ? rule.pairs[s.stochastic_state] : rule.staged;
}

UpdateRange checked(const RuleEntry* table, const Span& s) {
  check_argument(s.rule >= 0 && s.rule < generic::kRules, "rule ", s.rule,
                 " is not in the list of ", generic::kRules);
  const RuleEntry& rule = table[s.rule];
  const int p = static_cast<int>(s.param_dtype), g = static_cast<int>(s.grad_dtype);
  check_argument(p >= 0 && p < 3 && g >= 0 && g < 3 && rule.update[p][g] != nullptr, "rule ",
                 rule.name, " has no loop for parameter type ", p, " with gradient type ", g);
  check_argument(s.count >= 0, "a span's count must not be negative: ", s.count);
  check_kept(s, rule.name, rule.states, rule.non_negative);
  return loop_of(rule, s, rule.update[p][g]);
}

}  // namespace

void step(const Span* spans, std::size_t count, const Scaling& scaling, int threads) {
  const RuleEntry* table = current().load()->table;
  std::vector<UpdateRange> update(count);
  std::vector<std::int64_t> first(count);  // element at which span i starts
  std::int64_t total = 0;
  for (std::size_t i = 0; i < count; ++i) {
    update[i] = checked(table, spans[i]);
    first[i] = total;
    total += spans[i].count;
  }
  check_argument(threads >= 1, "threads must be at least 1: ", threads);
  if (scaling.found_inf != nullptr && *scaling.found_inf != 0.0f) return;
  double factor = scaling.clip != nullptr ? *scaling.clip : 1.0;
  if (scaling.grad_scale != nullptr) factor /= *scaling.grad_scale;

  const std::int64_t useful = 1 + (total - 1) / kMinElementsPerThread;
  parallel_for(
      total, grain_of(total, threads), static_cast<int>(useful < threads ? useful : threads),
      [&](std::int64_t begin, std::int64_t end) {
        // The span in which `begin` lies: the last that does not start after it.
        std::size_t i = std::upper_bound(first.begin(), first.end(), begin) - first.begin() - 1;
        for (; i < count && first[i] < end; ++i) {
          std::int64_t from = begin > first[i] ? begin - first[i] : 0;
          std::int64_t to = std::min(end - first[i], spans[i].count);
          if (spans[i].state_type == StateType::kCode8) {
            // A block of codes belongs to whoever has its first element.
            from = std::min(whole_blocks(from), spans[i].count);
            to = std::min(whole_blocks(to), spans[i].count);
          }
          if (from < to)
            update[i](spans[i], from, to, spans[i].grad_factor * static_cast<float>(factor));
        }
      });
}

int rule_count() { return generic::kRules; }

const RuleEntry& rule(int number) {
  check_argument(number >= 0 && number < rule_count(), "rule ", number, " is not in the list of ",
                 rule_count());
  return baseline::table()[number];
}

int rule_number(const std::string& name) {
  std::string offered;
  for (int i = 0; i < rule_count(); ++i) {
    if (name == rule(i).name) return i;
    offered += text(i == 0 ? "" : ", ", rule(i).name);
  }
  throw std::invalid_argument(text("no rule is called '", name, "'; there are: ", offered));
}

std::vector<std::string> instruction_sets() {
  std::vector<std::string> names;
  for (const InstructionSet& set : available()) names.emplace_back(set.name);
  return names;
}

const InstructionSet& set_in_use() { return *current().load(); }

std::string instruction_set() { return current().load()->name; }

void use_instruction_set(const std::string& name) { current().store(&find(name)); }

}  // namespace hift::cpu
