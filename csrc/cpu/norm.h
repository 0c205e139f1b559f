// SPDX-License-Identifier: Apache-2.0
// The norm of a group's gradients on the host: each is read once, by the widest instruction set the
// processor has, and the bits are those of core/norm.h on every number of threads.
#pragma once

#include <cstddef>

#include "core/norm.h"

namespace hift::cpu {

/// The sum of all gradients' squares, on at most `threads` threads. Throws std::invalid_argument
/// for a gradient of an unknown type, a negative count or no address.
double sum_of_squares(const Gradient* gradients, std::size_t count, int threads);

/// The norm and the coefficient of such a sum.
void write_clip(double sum_of_squares, const Clip& clip);

}  // namespace hift::cpu
