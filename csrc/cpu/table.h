// SPDX-License-Identifier: Apache-2.0
// What one instruction set offers: for every rule its name, its sizes and a loop for each pair of
// types. Plain data, so that it may cross from a translation unit compiled for AVX-512 into one
// that is not.
#pragma once

#include <cstdint>

#include "core/norm.h"
#include "core/span.h"

namespace hift {

/// Updates elements [begin, end) of the span; gradients are multiplied by `grad_factor` first.
using UpdateRange = void (*)(const Span& span, std::int64_t begin, std::int64_t end,
                             float grad_factor);

/// Sums the squares of each of a gradient's blocks [begin, end).
using SquareSums = void (*)(const Gradient& gradient, std::int64_t begin, std::int64_t end,
                            double* sums);

struct RuleEntry {
  const char* name;
  int states;
  int hypers;
  int non_negative;  // states without a sign, a bit each; -1: state is not kept as 8-bit codes
  UpdateRange
      update[3][3];  // [parameter's DType][gradient's DType]; null where the pair is not offered
  UpdateRange pairs[2];  // all bfloat16, rounded to nearest or at random
  UpdateRange staged;    // every way of keeping numbers
};

namespace baseline {
const RuleEntry* table();
const SquareSums* square_sums();  // by DType
}  // namespace baseline
namespace avx2 {
const RuleEntry* table();
const SquareSums* square_sums();
}  // namespace avx2
namespace avx512 {
const RuleEntry* table();
const SquareSums* square_sums();
}  // namespace avx512

namespace cpu {

struct InstructionSet {
  const char* name;
  const RuleEntry* table;
  const SquareSums* square_sums;
};

/// The one chosen for this process.
const InstructionSet& set_in_use();

}  // namespace cpu

}  // namespace hift
