// SPDX-License-Identifier: Apache-2.0
// The update on the host: a list of spans, split over threads, by the widest instruction set the
// processor has. Element by element the result is the same for every instruction set and every
// number of threads.
#pragma once

#include <cstddef>
#include <string>
#include <vector>

#include "core/span.h"
#include "cpu/table.h"

namespace hift::cpu {

/// Updates all spans in place; on at most `threads` threads. Does nothing where
/// `*scaling.found_inf` is not zero.
void step(const Span* spans, std::size_t count, const Scaling& scaling, int threads);

/// The rules, by number. Throws std::invalid_argument for a number or name that is not in the list.
int rule_count();
const RuleEntry& rule(int number);
int rule_number(const std::string& name);

/// Instruction sets compiled in that this processor has, narrowest first; the one in use; and a
/// choice by name (for tests; the environment variable HIFT_ISA chooses at start). Throws
/// std::invalid_argument for one not in the list.
std::vector<std::string> instruction_sets();
std::string instruction_set();
void use_instruction_set(const std::string& name);

}  // namespace hift::cpu
