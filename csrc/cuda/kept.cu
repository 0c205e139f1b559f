// SPDX-License-Identifier: Apache-2.0
// One kernel a rule for values, and one for 8-bit codes where the rule has them. In a file of its
// own, so that it compiles beside step.cu.
#include "cuda/kept.h"

#include <cstring>

#include "core/check.h"
#include "cuda/kept_kernel.h"
#include "cuda/tables.h"

namespace hift::cuda {
namespace {

template <class Rule>
KeptWork<Rule> kept_work_of(const Span& s, std::uint32_t first_block) {
  using Work = KeptWork<Rule>;
  Work w{};
  w.param = s.param;
  w.grad = s.grad;
  w.master = s.master;
  w.count = s.count;
  std::memcpy(&w.hyper, s.hyper, sizeof w.hyper);
  w.grad_factor = s.grad_factor;
  w.first_block = first_block;
  w.key = s.key;
  w.element = static_cast<std::uint64_t>(s.shard + s.first);
  w.param_dtype = s.param_dtype;
  w.grad_dtype = s.grad_dtype;
  w.state_type = s.state_type;
  w.weights = s.weights;
  w.stochastic_state = s.stochastic_state && s.state_type != StateType::kFloat32;
  w.has_master = master_size(s.weights) > 0;
  w.halved_master = master_size(s.weights) == 2;
  std::int64_t rest = 0;  // of addresses, in values
  const auto look = [&](const void* address, std::int64_t size) {
    const auto place = static_cast<std::int64_t>(reinterpret_cast<std::uintptr_t>(address));
    rest |= place % (size * Work::kWidth);
  };
  look(s.param, size_of(s.param_dtype));
  look(s.grad, size_of(s.grad_dtype));
  if (w.has_master) look(s.master, master_size(s.weights));
  for (int i = 0; i < Rule::states; ++i) {
    w.state[i] = s.state[i];
    if constexpr (codes<Rule>) w.scale[i] = s.scale[i];
    look(s.state[i], size_of(s.state_type));
  }
  w.packed = rest == 0;
  return w;
}

bool is_coded(const Span& s) { return s.state_type == StateType::kCode8; }

template <class Rule>
void run_rule(const Span* const* spans, std::size_t count, const Scaling& scaling, void* stream,
              int* launches) {
  using Table = Table<KeptWork<Rule>>;
  auto kernel = update_kept<Table>;
  if constexpr (codes<Rule>) {
    if (is_coded(*spans[0])) kernel = update_codes<Table>;
  }
  run_table(kernel, kept_work_of<Rule>, spans, count, scaling, stream, launches);
}

}  // namespace

int kept_kernel(const Span& span) { return 2 * span.rule + (is_coded(span) ? 1 : 0); }

void run_kept(const Span* const* spans, std::size_t count, const Scaling& scaling, void* stream,
              int* launches) {
#define HIFT_RUN(...) run_rule<__VA_ARGS__>,
  static constexpr decltype(&run_rule<Sgd>) kRun[] = {HIFT_RULES(HIFT_RUN)};
#undef HIFT_RUN
  kRun[spans[0]->rule](spans, count, scaling, stream, launches);
}

}  // namespace hift::cuda
